#!/usr/bin/env bash
# Run the four stages for one dataset (DATASET=) or one folder of images (IMAGES=).
# Edit or export the variables below. The same command continues a stopped run. Details go to results/$RUN/log.txt;
# `-v` prints them too. A preview that asks only a few requests: bash scripts/PA.sh --dry-run, with the same variables.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
options "${BASH_SOURCE[0]}" "$@"
expect_settings
expect 1+ MPA_ROUND

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
ROUNDS=${ROUNDS:-1}                                 # more: PI, PL and evaluate again with the levelled S-VLM, in results/$RUN/round-2 …
export PRESET=${PRESET:-paper}                      # anchored: recommended for your own images (docs/no-harm.md); released
export MIN_PARITY=${MIN_PARITY:-50}                        # a round with a smaller parity set is left out
GUARD=${GUARD:-$([[ $DATASET == images || $ROUNDS != 1 || $PRESET == anchored ]] && echo 1 || echo 0)} # 1: hold out 15 % of the images, and say if PL made the S-VLM worse
export REMEDY=${REMEDY:-0}                          # 1: if it did, try remedies; scripts/guard.sh -h
PA_FLAGS=${PA_FLAGS:-}                              # further flags for PA, e.g. "--temperature 1"
PI_FLAGS=${PI_FLAGS:-}
PL_FLAGS=${PL_FLAGS:-}                              # of the trainer, e.g. "--anchor_kl 1"
EVALUATE_FLAGS=${EVALUATE_FLAGS:-}
# The stages also read BATCH_SIZE, SEED, MIN_PIXELS, MAX_PIXELS, MAX_TILES, PL_BATCH_SIZE, LEARNING_RATE, EPOCHS …

if [[ $IMAGES && $DATASET != images ]]; then
    echo "error: IMAGES is a folder of your own images, and DATASET is $DATASET. Unset one of them." >&2
    exit 2
fi
if [[ $GUARD$REMEDY != 00 && $DATASET != images ]]; then PI_FLAGS="--hold-out 0.15 $PI_FLAGS"; fi
FOLDER=$(run_folder "$RUN")
L=$(basename -- "$LVLM") S=$(basename -- "$SVLM") ROUND=${MPA_ROUND:-1} # the round is said by the one before, at the end
unset MPA_ROUND
LEVELLED=$FOLDER/PL_${L}_${S}_$DATASET

# Check both models before hours of work with the first.
LOCAL=("$SVLM") && [[ $LVLM_ENGINE == openai ]] || LOCAL+=("$LVLM")
PYTHONPATH=$ROOT run python -P -m mpa.models "${LOCAL[@]}"
title "PA: $L annotates ${IMAGES:-the images of $DATASET}"
# shellcheck disable=SC2086 # the flags must be split into words
run bash "$ROOT/scripts/PA.sh" --engine "$LVLM_ENGINE" $SERVER_FLAGS \
    ${QUANTIZATION:+--quantization "$QUANTIZATION"} ${IMAGES:+--image-root "$IMAGES"} ${LIMIT:+--limit "$LIMIT"} $PA_FLAGS
title "PI: keep what $L answers consistently and $S gets wrong"
# shellcheck disable=SC2086
run bash "$ROOT/scripts/PI.sh" --engine "$ENGINE" --engine-lvlm "$LVLM_ENGINE" $SERVER_FLAGS \
    ${QUANTIZATION:+--quantization "$QUANTIZATION"} $PI_FLAGS
if ((ROUND > 1)); then
    SAMPLES=$(PYTHONPATH=$ROOT python -P -c 'import sys; from mpa import records; print(len(records.read_parity(sys.argv[1])))' \
        "$FOLDER/PI_${L}_train_${L}_${S}_$DATASET.json")
    if ((SAMPLES < MIN_PARITY)); then
        echo "No round $ROUND: its parity set has $SAMPLES samples, fewer than $MIN_PARITY. Use the model of the round before, $(realpath "$SVLM")."
        exit
    fi
fi
title "PL: fine-tune $S on the parity set"
# shellcheck disable=SC2086
run bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh" $PL_FLAGS
SVLM_FLAGS="--engine $ENGINE $SERVER_FLAGS"
if [[ $DATASET == images ]]; then # the held-out set is what the L-VLM agrees with, so only the S-VLM is asked
    title "evaluate: before and after"
    SVLM_FLAGS+=" $EVALUATE_FLAGS"
    # shellcheck disable=SC2086
    run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" --model-path-lvlm "$LVLM" $SVLM_FLAGS
else
    title "evaluate: before, after, and the L-VLM"
    # shellcheck disable=SC2086
    run bash "$ROOT/evaluate.sh" --model-path "$SVLM" "$LEVELLED" "$LVLM" --model-path-lvlm "$LVLM" $SVLM_FLAGS \
        --engine-lvlm "$LVLM_ENGINE" ${QUANTIZATION:+--quantization "$QUANTIZATION"} $EVALUATE_FLAGS
fi
if [[ $GUARD$REMEDY != 00 ]]; then
    title "guard: is the levelled $S worse on held-out questions?"
    # shellcheck disable=SC2086
    PI_FLAGS=$PI_FLAGS PL_FLAGS=$PL_FLAGS run bash "$ROOT/scripts/guard.sh" $SVLM_FLAGS
fi
run python "$ROOT/scripts/tables.py" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM" "$FOLDER"
run python "$ROOT/scripts/diagnose.py" "$FOLDER" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM"
if [[ $REPORT != 0 ]]; then
    run python "$ROOT/scripts/report.py" "$FOLDER" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM" ${IMAGES:+--image-root "$IMAGES"}
fi

if ((ROUNDS > 1)); then
    BETTER=$(python -c 'import json, sys; print(json.load(open(sys.argv[1]))["recommended"] or "")' "$FOLDER/guard_${L}_${S}_$DATASET.json")
    if [[ ! $BETTER ]]; then
        echo "No round $((ROUND + 1)): the guard calls no levelled $S better than the one before."
        exit
    fi
    # A run of its own, which has the L-VLM's part of this one, and in which the levelled model is the S-VLM.
    FIRST=$(realpath -ms -- "$FOLDER") PREVIOUS=..
    if ((ROUND > 1)); then FIRST=$(dirname "$FIRST") PREVIOUS=../round-$ROUND; fi
    NEXT=$FIRST/round-$((ROUND + 1))
    mkdir -p "$NEXT"
    for FILE in "$FOLDER/"{PA,PI_"$L",Eval}_"${L}_$DATASET".* "$FOLDER/PI_${L}_"{heldout,heldout-given,given}"_$DATASET".*; do
        if [[ -e $FILE ]]; then ln -f "$FILE" "$NEXT"; fi
    done
    ln -sfn "$PREVIOUS/$BETTER" "$NEXT/$S"
    title "Round $((ROUND + 1)): $BETTER is the S-VLM"
    exec env MPA_ROUND=$((ROUND + 1)) RUN="$NEXT" SVLM="$NEXT/$S" ROUNDS=$((ROUNDS - 1)) GUARD=1 bash "$ROOT/scripts/mpa.sh"
fi
