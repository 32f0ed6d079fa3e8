#!/usr/bin/env bash
# Merge LoRA adapters into their base model.
#   ADAPTER=output/finetune_lora OUTPUT_DIR=output/merged bash scripts/merge_lora.sh
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/launch.sh"

exec python "$HERE/../src/merge_lora.py" --model-path "${ADAPTER:?name the output folder of a LoRA training}" \
    --save-model-path "${OUTPUT_DIR:?name the folder to write}" "$@"
