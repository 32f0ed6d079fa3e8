#!/usr/bin/env bash
# The four stages in a row, for one dataset (DATASET=) or one folder of images (IMAGES=).
# Edit or export what you change. A second call goes on where the first stopped.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"

IMAGES=${IMAGES:-}                                  # a folder of your own images, without labels
export DATASET=${DATASET:-$([[ $IMAGES ]] && echo images || echo textVQA)}
export LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct}      # folders or hub ids
export SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct}
export RUN=${RUN:-$(date +%F)}                      # results go to results/$RUN
LIMIT=${LIMIT:-}                                    # annotate only the first so many images
ENGINE=${ENGINE:-hf}                                # what runs the models
LVLM_ENGINE=${LVLM_ENGINE:-$ENGINE}                 # openai: the L-VLM is behind a server
SERVER_FLAGS=${SERVER_FLAGS:-}                      # for it, e.g. "--base-url http://localhost:8000/v1"
PA_FLAGS=${PA_FLAGS:-}                              # more flags for a stage, e.g. "--temperature 1"
PI_FLAGS=${PI_FLAGS:-}
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}
# BATCH_SIZE, SEED, PRESET, MIN_PIXELS, MAX_PIXELS, PL_BATCH_SIZE, LEARNING_RATE, EPOCHS … reach the stages as they are.

FOLDER=$RUN && [[ $RUN == */* ]] || FOLDER=$ROOT/results/$RUN
LEVELLED=$FOLDER/PL_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET

# Both models are looked at before hours of work for the first.
LOCAL=("$SVLM") && [[ $LVLM_ENGINE == openai ]] || LOCAL+=("$LVLM")
PYTHONPATH=$ROOT run python -m mpa.models "${LOCAL[@]}"
# shellcheck disable=SC2086 # the flags are words
run bash "$ROOT/scripts/PA.sh" --engine "$LVLM_ENGINE" $SERVER_FLAGS \
    ${IMAGES:+--image-root "$IMAGES"} ${LIMIT:+--limit "$LIMIT"} $PA_FLAGS
# shellcheck disable=SC2086
run bash "$ROOT/scripts/PI.sh" --engine "$ENGINE" --engine-lvlm "$LVLM_ENGINE" $SERVER_FLAGS $PI_FLAGS
run bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh"
# shellcheck disable=SC2086
run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" "$LVLM" --model-path-lvlm "$LVLM" \
    --engine "$ENGINE" --engine-lvlm "$LVLM_ENGINE" $SERVER_FLAGS $EVALUATE_FLAGS
run python "$ROOT/scripts/tables.py" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM" "$FOLDER"
