#!/usr/bin/env bash
# Stage 1, the Pseudo Annotator: the L-VLM writes a question and an answer for each image.
# Edit or export what you change; `PA.sh --help` lists all flags, and those you add are passed on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATASET=${DATASET:-textVQA}                  # textVQA stVQA chartVQA okVQA easyVQA images
LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct}      # a folder or a hub id
RUN=${RUN:-$(date +%F)}                      # results go to results/$RUN
PRESET=${PRESET:-paper}                      # or: released
BATCH_SIZE=${BATCH_SIZE:-8}
# GPUS=8                                     # processes that share the images, a GPU each (default: 1)
DTYPE=${DTYPE:-auto}                         # auto: the one this device is quick in
SEED=${SEED:-0}
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))} # an image is resized to between these areas
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}

stage PA.py --dataset "$DATASET" --model-path-lvlm "$LVLM" --run="$RUN" --preset "$PRESET" \
    --batch-size "$BATCH_SIZE" --dtype "$DTYPE" --seed "$SEED" --min-pixels "$MIN_PIXELS" --max-pixels "$MAX_PIXELS" "$@"
