#!/usr/bin/env bash
# Run the four stages for one dataset (DATASET=) or one folder of images (IMAGES=).
# Edit or export the variables below. The same command continues a stopped run. Details go to results/$RUN/log.txt;
# `-v` prints them too. A preview that asks only a few requests: bash scripts/PA.sh --dry-run, with the same variables.
# The stages also read their own variables, such as BATCH_SIZE, SEED, EPOCHS and LEARNING_RATE: `PA.sh -h`, `PL.sh -h` …
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
options "${BASH_SOURCE[0]}" "$@"
expect_settings

export IMAGES=${IMAGES:-}           # a folder of your own images, without labels: DATASET is then images
if [[ $IMAGES && ${DATASET:-images} != images ]]; then
    echo "error: IMAGES is a folder of your own images, and DATASET is $DATASET. Unset one of them." >&2
    exit 2
fi
: "${DATASET:=${IMAGES:+images}}"
about DATASET=dataset LVLM=lvlm SVLM=svlm RUN=folder LEVELLED=levelled
export DATASET LVLM SVLM RUN
LIMIT=${LIMIT:-}                    # annotate only the first N images
ENGINE=${ENGINE:-}                  # the engine of the models (hf)
LVLM_ENGINE=${LVLM_ENGINE:-$ENGINE} # openai: the L-VLM is served by an API
SERVER_FLAGS=${SERVER_FLAGS:-}      # flags for the server, e.g. "--base-url http://localhost:8000/v1"
QUANTIZATION=${QUANTIZATION:-}      # 8bit or 4bit: for an L-VLM that does not fit, with hf
export PRESET=${PRESET:-}           # anchored: recommended for your own images (docs/no-harm.md); released (paper)
GUARD=${GUARD:-$([[ $DATASET == images || $PRESET == anchored ]] && echo 1 || echo 0)} # 1: hold out 15 % of the images, and say if PL made the S-VLM worse
export REMEDY=${REMEDY:-0}          # 1: if it did, try remedies; scripts/guard.sh -h
REPORT=${REPORT:-1}                 # 0: no HTML report at the end
PA_FLAGS=${PA_FLAGS:-}              # further flags for PA, e.g. "--temperature 1"
export PI_FLAGS=${PI_FLAGS:-}       # and PI
export PL_FLAGS=${PL_FLAGS:-}       # and the trainer, e.g. "--packing True"
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}  # and evaluate

if [[ $GUARD$REMEDY != 00 && $DATASET != images ]]; then PI_FLAGS="--hold-out 0.15 $PI_FLAGS"; fi
L=$(basename -- "$LVLM") S=$(basename -- "$SVLM")
SVLM_FLAGS="${ENGINE:+--engine $ENGINE} $SERVER_FLAGS"
ALONE_FLAGS="${ENGINE:+--engine $ENGINE}" # where the S-VLM alone is asked, which may be no server
if [[ $ENGINE == openai || $ENGINE == ray ]]; then ALONE_FLAGS=$SVLM_FLAGS; fi
LVLM_FLAGS="${LVLM_ENGINE:+--engine-lvlm $LVLM_ENGINE} ${QUANTIZATION:+--quantization $QUANTIZATION}"
CELL=("$RUN" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM")

# Check both models before hours of work with the first.
LOCAL=("$SVLM") && [[ $LVLM_ENGINE == openai ]] || LOCAL+=("$LVLM")
PYTHONPATH=$ROOT run python -P -m mpa.models "${LOCAL[@]}"

# shellcheck disable=SC2086 # the flags must be split into words
{
    title "PA: $L annotates ${IMAGES:-the images of $DATASET}"
    run bash "$ROOT/scripts/PA.sh" ${LVLM_FLAGS/--engine-lvlm/--engine} $SERVER_FLAGS ${LIMIT:+--limit "$LIMIT"} $PA_FLAGS
    title "PI: keep what $L answers consistently and $S gets wrong"
    run bash "$ROOT/scripts/PI.sh" $SVLM_FLAGS $LVLM_FLAGS $PI_FLAGS
    title "PL: fine-tune $S on the parity set"
    run bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh" $PL_FLAGS
    if [[ $DATASET == images ]]; then # the held-out set is what the L-VLM agrees with, so only the S-VLM is asked
        title "evaluate: before and after"
        ALONE_FLAGS+=" $EVALUATE_FLAGS"
        run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" --model-path-lvlm "$LVLM" $ALONE_FLAGS
    else
        title "evaluate: before, after, and the L-VLM"
        run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" "$LVLM" --model-path-lvlm "$LVLM" $SVLM_FLAGS \
            $LVLM_FLAGS $EVALUATE_FLAGS
    fi
    if [[ $GUARD$REMEDY != 00 ]]; then
        title "guard: is the levelled $S worse on held-out questions?"
        run bash "$ROOT/scripts/guard.sh" $ALONE_FLAGS
    fi
}
run python "$ROOT/scripts/tables.py" "${CELL[@]}"
run python "$ROOT/scripts/diagnose.py" "${CELL[@]}"
if [[ $REPORT != 0 ]]; then run python "$ROOT/scripts/report.py" "${CELL[@]}" ${IMAGES:+--image-root "$IMAGES"}; fi
