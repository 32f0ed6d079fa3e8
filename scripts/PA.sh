#!/usr/bin/env bash
# Stage 1, the Pseudo Annotator: the L-VLM writes a question and an answer for each image.
# Edit or export the variables below; `PA.sh --help` lists all flags; further arguments are flags of the stage.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

IMAGES=${IMAGES:-}                           # a folder of your own images: DATASET is then images
DATASET=${DATASET:-$([[ $IMAGES ]] && echo images || echo textVQA)} # textVQA stVQA chartVQA okVQA easyVQA images
LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct}      # a folder or a hub id
RUN=${RUN:-$(date +%F)}                      # results go to results/$RUN
PRESET=${PRESET:-paper}                      # or: released, anchored
BATCH_SIZE=${BATCH_SIZE:-8}
# GPUS=8                                     # number of processes, one per GPU; they share the images (default: 1)
DTYPE=${DTYPE:-auto}                         # auto: bfloat16 or float16 on a GPU, float32 on a CPU
SEED=${SEED:-0}
MIN_PIXELS=${MIN_PIXELS:-$((128 * 28 * 28))} # images are resized to an area within these limits
MAX_PIXELS=${MAX_PIXELS:-$((512 * 28 * 28))}
MAX_TILES=${MAX_TILES:-}                     # at most so many tiles of an image (default: InternVL 6, else the model's)

stage PA.py --dataset "$DATASET" --model-path-lvlm "$LVLM" --run="$RUN" --preset "$PRESET" \
    --batch-size "$BATCH_SIZE" --dtype "$DTYPE" --seed "$SEED" --min-pixels "$MIN_PIXELS" --max-pixels "$MAX_PIXELS" \
    ${MAX_TILES:+--max-tiles "$MAX_TILES"} ${IMAGES:+--image-root "$IMAGES"} "$@"
