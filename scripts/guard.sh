#!/usr/bin/env bash
# The guard: ask the S-VLM before and after PL the run's held-out questions, and say whether it became worse. No labels are needed.
# PI must have held out images: PI_FLAGS="--hold-out 0.15"; for IMAGES it always does. `scripts/mpa.sh` with GUARD=1 calls this.
# With REMEDY=1 and a verdict of worse, remedies are tried in this order, each on top of the one before, until one is better
# than the original: anchors (which PRESET=anchored has already), a third of the learning rate, half of the epochs. Arguments are flags of evaluate.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then options "${BASH_SOURCE[0]}" "$1"; fi
expect_settings
expect any ANCHORS

export DATASET=${DATASET:-textVQA}
export LVLM=${LVLM:-Qwen/Qwen2-VL-7B-Instruct}      # folders or hub ids, as in the run
export SVLM=${SVLM:-Qwen/Qwen2-VL-2B-Instruct}
export RUN=${RUN:-$(date +%F)}
REMEDY=${REMEDY:-0}                                 # 1: try the remedies
ANCHORS=${ANCHORS:-100}                             # of the remedies, per parity sample; 100: as many as there are
export PRESET=${PRESET:-paper}
PI_FLAGS=${PI_FLAGS:-}                              # the flags that PI had
PL_FLAGS=${PL_FLAGS:-}                              # and the trainer
# PL's settings in this run, which the remedies lower; the defaults are those of PL.sh.
EPOCHS=${EPOCHS:-1}
LEARNING_RATE=${LEARNING_RATE:-1e-5}
MERGER_LR=${MERGER_LR:-$LEARNING_RATE}
VISION_LR=${VISION_LR:-2e-6}

RUN=$(run_folder "$RUN")
L=$(basename -- "$LVLM") S=$(basename -- "$SVLM")
LEVELLED=$RUN/PL_${L}_${S}_$DATASET
TRAIN=$RUN/PI_${L}_train_${L}_${S}_$DATASET.json
CELL=("$RUN" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM")

ask() { # ask MODELS… FLAGS…
    run bash "$ROOT/evaluate.sh" --held-out --model-path-lvlm "$LVLM" --model-path "$@"
}
verdict() { python "$ROOT/scripts/guard.py" "${CELL[@]}" --variant "$1" --verdict; }
divided() { python -c 'import sys; print(float(sys.argv[1]) / float(sys.argv[2]))' "$@"; }

ask "$SVLM" "$LEVELLED" "$@"
VERDICT=$(verdict mpa)
if [[ $REMEDY != 0 && $VERDICT == worse ]]; then
    echo "The levelled S-VLM is worse than the one it came from. Trying remedies."
    REMEDIES=(slow slow-short)
    if [[ $PRESET != anchored ]]; then
        TRAIN=${TRAIN%.json}_anchors-$ANCHORS.json REMEDIES=(anchors anchors-slow anchors-slow-short)
        # shellcheck disable=SC2086 # the flags must be split into words
        run bash "$ROOT/scripts/PI.sh" $PI_FLAGS --anchors "$ANCHORS" --out "$TRAIN" \
            --lvlm-json "$RUN/PI_${L}_${L}_$DATASET.json" --svlm-json "$RUN/PI_${L}_${S}_$DATASET.json"
    fi
    for NAME in "${REMEDIES[@]}"; do
        [[ $VERDICT != better ]] || break
        SETTINGS=("LEARNING_RATE=$LEARNING_RATE" "MERGER_LR=$MERGER_LR" "VISION_LR=$VISION_LR" "EPOCHS=$EPOCHS")
        if [[ $NAME == *slow* ]]; then
            SETTINGS[0]=LEARNING_RATE=$(divided "$LEARNING_RATE" 3)
            SETTINGS[1]=MERGER_LR=$(divided "$MERGER_LR" 3)
            SETTINGS[2]=VISION_LR=$(divided "$VISION_LR" 3)
        fi
        if [[ $NAME == *short ]]; then SETTINGS[3]=EPOCHS=$(divided "$EPOCHS" 2); fi
        title "Remedy: $NAME (${SETTINGS[*]})"
        # shellcheck disable=SC2086
        run env TRAIN_JSON="$TRAIN" OUTPUT_DIR="${LEVELLED}_$NAME" "${SETTINGS[@]}" \
            bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh" $PL_FLAGS
        ask "${LEVELLED}_$NAME" "$@"
        VERDICT=$(verdict "$NAME")
    done
fi
run python "$ROOT/scripts/guard.py" "${CELL[@]}"
