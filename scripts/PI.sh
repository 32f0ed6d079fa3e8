#!/usr/bin/env bash
# Stage 2, the Parity Identifier: keep what the L-VLM answers consistently and the S-VLM gets wrong.
# Export the variables below, each for the flag beside it, or give the flags themselves: `PI.sh --help` shows them, and their defaults.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

FLAGS=(
    ${DATASET:+--dataset "$DATASET"}      # textVQA stVQA chartVQA okVQA easyVQA images
    ${LVLM:+--model-path-lvlm "$LVLM"}    # a folder or a hub id
    ${SVLM:+--model-path-svlm "$SVLM"}
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
stage PI.py "${FLAGS[@]}" "$@"
