#!/usr/bin/env bash
# Stage 1, the Pseudo Annotator: the L-VLM writes a question and an answer for each image.
# Export the variables below, each for the flag beside it, or give the flags themselves: `PA.sh --help` shows them, and their defaults.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

: "${DATASET:=${IMAGES:+images}}"
FLAGS=(
    ${IMAGES:+--image-root "$IMAGES"}     # a folder of your own images: DATASET is then images
    ${DATASET:+--dataset "$DATASET"}      # textVQA stVQA chartVQA okVQA easyVQA images
    ${LVLM:+--model-path-lvlm "$LVLM"}    # a folder or a hub id
    ${RUN:+--run="$RUN"}                  # results go to results/$RUN
    ${PRESET:+--preset "$PRESET"}         # paper, released, anchored
    ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} # the most; empty: on a GPU what fits in memory
    ${DTYPE:+--dtype "$DTYPE"}
    ${SEED:+--seed "$SEED"}
    ${MIN_PIXELS:+--min-pixels "$MIN_PIXELS"} # images are resized to an area within these limits
    ${MAX_PIXELS:+--max-pixels "$MAX_PIXELS"}
    ${MAX_TILES:+--max-tiles "$MAX_TILES"}
)
# GPUS=8: as many processes, one per GPU; they share the images
stage PA.py "${FLAGS[@]}" "$@"
