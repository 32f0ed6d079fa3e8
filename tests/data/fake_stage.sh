#!/usr/bin/env bash
# Stands for PA.sh, PI.sh, PL.sh and evaluate.sh in tests/test_reproduce.py: writes the files that they would write, each whole
# and once. $CALLS gets a line per file that is made. A model that is named in $BROKEN fails.
set -euo pipefail
STAGE=$(basename "$0" .sh) PAUSE=${PAUSE:-0} OUT='' PATH_OF_MODEL='' OF_LVLM='' HELD_OUT='' ONLY_LVLM='' MATCH=exact ANCHORS='' MIXED=()
while (($#)); do
    case $1 in
    --only-lvlm) ONLY_LVLM=1 ;;
    --model-path) PATH_OF_MODEL=$2 && shift ;;
    --model-path-lvlm) OF_LVLM=$(basename "$2") && shift ;;
    --held-out) HELD_OUT=1 ;;
    --match) MATCH=$2 && shift ;;
    --anchors) ANCHORS="$2 anchors" && shift ;;
    --out) OUT=$2 && shift ;;
    --data_path) MIXED=("${@:2}" "$MPA_DATA") ;;
    --lvlm-json | --svlm-json) [[ -f $2 ]] && shift ;;
    esac
    shift
done
L=$(basename "${LVLM:-}") S=$(basename "${SVLM:-}")

make() { # make FILE WORDS…
    local file=$1 started
    [[ ! -e $file ]] || { echo "$file already exists" && return; }
    mkdir -p "$(dirname "$file")"
    started=$(date +%s%N)
    sleep "$PAUSE"
    [[ ! ${CUDA_VISIBLE_DEVICES:-} ]] || echo "$STAGE $CUDA_VISIBLE_DEVICES $started $(date +%s%N)" >>"$CALLS.gpus"
    echo '{"unfinished": 0}' >"${file%.json}.meta.json"
    echo "${*:2}" >"$file.part"
    mv "$file.part" "$file"
    echo "$STAGE ${file#"$(dirname "$RUN")/"}" >>"$CALLS"
}

[[ ! ${BROKEN:-} || " $L $S $PATH_OF_MODEL" != *"$BROKEN"* || ($STAGE == PI && $ONLY_LVLM) ]] || { echo "error: broken" >&2 && exit 1; }
case $STAGE in
PA) make "$RUN/PA_${L}_$DATASET.json" "$L" "$DATASET" "$SEED" ;;
PI)
    if [[ $OUT ]]; then
        make "$OUT" "$MATCH${ANCHORS:+ $ANCHORS}"
    else
        [[ -f $RUN/PA_${L}_$DATASET.json ]]
        make "$RUN/PI_${L}_${L}_$DATASET.json" "$L"
        [[ $ONLY_LVLM ]] || make "$RUN/PI_${L}_${S}_$DATASET.json" "$L" "$S"
        [[ $ONLY_LVLM ]] || make "$RUN/PI_${L}_train_${L}_${S}_$DATASET.json" "$L" "$S"
    fi
    ;;
PL) make "$OUTPUT_DIR/train_meta.json" "$(cat "$TRAIN_JSON")" "$SEED" "${EPOCHS:-1}" "${LEARNING_RATE:-1e-5}" "${MIXED[@]}" ;;
evaluate) make "$RUN/$([[ $HELD_OUT ]] && echo "Heldout_$OF_LVLM" || echo Eval)_$(basename "$PATH_OF_MODEL")_$DATASET.json" "$(cat "$PATH_OF_MODEL/train_meta.json" 2>/dev/null)" ;;
esac
