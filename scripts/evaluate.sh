#!/usr/bin/env bash
# Stage 4: ask one or more models the human test questions and score the answers.
# Export the variables below, each for the flag beside it, or give the flags themselves: `evaluate.sh --help` shows them, and their defaults.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

read -ra MODELS <<<"${MODEL:-}"
FLAGS=(
    ${DATASET:+--dataset "$DATASET"}      # textVQA stVQA chartVQA okVQA easyVQA images
    ${MODEL:+--model-path "${MODELS[@]}"} # folders or hub ids, separated by spaces
    ${RUN:+--run="$RUN"}                  # results go to results/$RUN
    ${PRESET:+--preset "$PRESET"}         # paper, released, anchored
    ${BATCH_SIZE:+--batch-size "$BATCH_SIZE"} # the most; empty: on a GPU what fits in memory
    ${DTYPE:+--dtype "$DTYPE"}
    ${MIN_PIXELS:+--min-pixels "$MIN_PIXELS"} # images are resized to an area within these limits
    ${MAX_PIXELS:+--max-pixels "$MAX_PIXELS"}
    ${MAX_TILES:+--max-tiles "$MAX_TILES"}
)
# GPUS=8: as many processes, one per GPU; they share the images
stage evaluate.py "${FLAGS[@]}" "$@"
