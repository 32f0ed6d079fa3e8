#!/usr/bin/env bash
# Run the four stages for one dataset (DATASET=) or one folder of images (IMAGES=).
# Edit or export the variables below. The same command continues a stopped run. Details go to results/$RUN/log.txt;
# `-v` prints them too. A preview that asks only a few requests: bash scripts/PA.sh --dry-run, with the same variables.
set -euo pipefail
source "$(dirname "${BASH_SOURCE[0]}")/environment.sh"
options "${BASH_SOURCE[0]}" "$@"

export IMAGES=${IMAGES:-}                              # a folder of your own images, without labels
export DATASET=${DATASET:-$([[ $IMAGES ]] && echo images || echo textVQA)}
export LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct}      # folders or hub ids
export SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct}
export RUN=${RUN:-$(date +%F)}                      # results go to results/$RUN
LIMIT=${LIMIT:-}                                    # annotate only the first N images
ENGINE=${ENGINE:-hf}                                # the engine of the models
LVLM_ENGINE=${LVLM_ENGINE:-$ENGINE}                 # openai: the L-VLM is served by an API
SERVER_FLAGS=${SERVER_FLAGS:-}                      # flags for the server, e.g. "--base-url http://localhost:8000/v1"
QUANTIZATION=${QUANTIZATION:-}                      # 8bit or 4bit: for an L-VLM that does not fit, with hf
REPORT=${REPORT:-1}                                 # 0: no HTML report at the end
PA_FLAGS=${PA_FLAGS:-}                              # further flags for PA, e.g. "--temperature 1"
PI_FLAGS=${PI_FLAGS:-}
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}
# The stages also read BATCH_SIZE, SEED, PRESET, MIN_PIXELS, MAX_PIXELS, MAX_TILES, PL_BATCH_SIZE, LEARNING_RATE, EPOCHS …

if [[ $IMAGES && $DATASET != images ]]; then
    echo "error: IMAGES is a folder of your own images, and DATASET is $DATASET. Unset one of them." >&2
    exit 2
fi
FOLDER=$RUN && [[ $RUN == */* ]] || FOLDER=$ROOT/results/$RUN
LEVELLED=$FOLDER/PL_$(basename "$LVLM")_$(basename "$SVLM")_$DATASET

# Check both models before hours of work with the first.
LOCAL=("$SVLM") && [[ $LVLM_ENGINE == openai ]] || LOCAL+=("$LVLM")
PYTHONPATH=$ROOT run python -P -m mpa.models "${LOCAL[@]}"
title "PA: $(basename "$LVLM") annotates ${IMAGES:-the images of $DATASET}"
# shellcheck disable=SC2086 # the flags must be split into words
run bash "$ROOT/scripts/PA.sh" --engine "$LVLM_ENGINE" $SERVER_FLAGS \
    ${QUANTIZATION:+--quantization "$QUANTIZATION"} ${IMAGES:+--image-root "$IMAGES"} ${LIMIT:+--limit "$LIMIT"} $PA_FLAGS
title "PI: keep what $(basename "$LVLM") answers consistently and $(basename "$SVLM") gets wrong"
# shellcheck disable=SC2086
run bash "$ROOT/scripts/PI.sh" --engine "$ENGINE" --engine-lvlm "$LVLM_ENGINE" $SERVER_FLAGS \
    ${QUANTIZATION:+--quantization "$QUANTIZATION"} $PI_FLAGS
title "PL: fine-tune $(basename "$SVLM") on the parity set"
run bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh"
title "evaluate: before, after, and the L-VLM"
# shellcheck disable=SC2086
run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" "$LVLM" --model-path-lvlm "$LVLM" \
    --engine "$ENGINE" --engine-lvlm "$LVLM_ENGINE" $SERVER_FLAGS \
    ${QUANTIZATION:+--quantization "$QUANTIZATION"} $EVALUATE_FLAGS
run python "$ROOT/scripts/tables.py" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM" "$FOLDER"
run python "$ROOT/scripts/diagnose.py" "$FOLDER" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM"
if [[ $REPORT != 0 ]]; then
    run python "$ROOT/scripts/report.py" "$FOLDER" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM" ${IMAGES:+--image-root "$IMAGES"}
fi
