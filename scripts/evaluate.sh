#!/usr/bin/env bash
# Stage 4: ask a model, or several, the human test questions and score the answers.
# Edit or export what you change; `evaluate.sh --help` lists all flags, and those you add are passed on.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

DATASET=${DATASET:-textVQA}                  # textVQA stVQA chartVQA okVQA easyVQA images
MODEL=${MODEL:-Qwen/Qwen2-VL-2B-Instruct}    # folders or hub ids, with spaces between several
RUN=${RUN:-$(date +%F)}                      # results go to results/$RUN
PRESET=${PRESET:-paper}                      # or: released
BATCH_SIZE=${BATCH_SIZE:-8}
# GPUS=8                                     # processes that share the images, a GPU each (default: 1)
DTYPE=${DTYPE:-auto}                         # auto: the one this device is quick in
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))} # an image is resized to between these areas
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}

read -ra MODELS <<<"$MODEL"
stage evaluate.py --dataset "$DATASET" --model-path "${MODELS[@]}" --run="$RUN" --preset "$PRESET" \
    --batch-size "$BATCH_SIZE" --dtype "$DTYPE" --min-pixels "$MIN_PIXELS" --max-pixels "$MAX_PIXELS" "$@"
