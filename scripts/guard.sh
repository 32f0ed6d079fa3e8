#!/usr/bin/env bash
# The guard: ask the S-VLM before and after PL the run's held-out questions, and say whether it became worse. No labels are needed.
# PI must have held out images: PI_FLAGS="--hold-out 0.15"; for IMAGES it always does. `scripts/mpa.sh` with GUARD=1 calls this.
# With REMEDY=1 and a verdict of worse, remedies are tried in this order, each on top of the one before, until one is better
# than the original: anchors (which PRESET=anchored has already), a third of the learning rate, half of the epochs. Arguments are flags of evaluate.
# The variables are those of the run.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"
if [[ ${1:-} == -h || ${1:-} == --help ]]; then options "${BASH_SOURCE[0]}" "$1"; fi
expect_settings
expect any ANCHORS

about DATASET=dataset LVLM=lvlm SVLM=svlm RUN=folder LEVELLED=levelled OF_LVLM=lvlm_answers OF_SVLM=svlm_answers
export DATASET LVLM SVLM RUN
REMEDY=${REMEDY:-0}       # 1: try the remedies
ANCHORS=${ANCHORS:-100}   # of the remedies, per parity sample; 100: as many as there are
export PRESET=${PRESET:-} # paper, released, anchored (paper)
PI_FLAGS=${PI_FLAGS:-}    # the flags that PI had
PL_FLAGS=${PL_FLAGS:-}    # and the trainer

CELL=("$RUN" --dataset "$DATASET" --lvlm "$LVLM" --svlm "$SVLM")
ask() { # ask MODELS… FLAGS…
    run bash "$ROOT/evaluate.sh" --held-out --model-path-lvlm "$LVLM" --model-path "$@"
}
verdict() { python "$ROOT/scripts/guard.py" "${CELL[@]}" --variant "$1" --verdict; }

ask "$SVLM" "$LEVELLED" "$@"
VERDICT=$(verdict mpa)
if [[ $REMEDY != 0 && $VERDICT == worse ]]; then
    echo "The levelled S-VLM is worse than the one it came from. Trying remedies."
    REMEDIES=$(PYTHONPATH=$ROOT python -P -m mpa.analysis.remedies "$LEVELLED" ${PRESET:+--preset "$PRESET"})
    about TRAIN_JSON="train$([[ $PRESET == anchored ]] || echo ":anchors-$ANCHORS")"
    export TRAIN_JSON
    if [[ $PRESET != anchored ]]; then
        # shellcheck disable=SC2086 # the flags must be split into words
        run bash "$ROOT/scripts/PI.sh" $PI_FLAGS --anchors "$ANCHORS" --out "$TRAIN_JSON" --lvlm-json "$OF_LVLM" --svlm-json "$OF_SVLM"
    fi
    while [[ $VERDICT != better ]] && read -r NAME SETTINGS <&3; do
        title "Remedy: $NAME ($SETTINGS)"
        about OUTPUT_DIR="levelled:$NAME"
        # shellcheck disable=SC2086
        run env OUTPUT_DIR="$OUTPUT_DIR" $SETTINGS bash "$ROOT/PL/Qwen2-VL-Finetune/scripts/PL.sh" $PL_FLAGS
        ask "$OUTPUT_DIR" "$@"
        VERDICT=$(verdict "$NAME")
    done 3<<<"$REMEDIES"
fi
run python "$ROOT/scripts/guard.py" "${CELL[@]}"
