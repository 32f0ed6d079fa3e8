#!/usr/bin/env bash
# A job of scripts/reproduce.sh: `cell.sh FOLDER RESULT GPUS CMD…` runs CMD on that many GPUs of its own.
# What it prints goes to FOLDER/logs/RESULT.log. A failure leaves the command that repeats it in FOLDER/failed/RESULT.
set -euo pipefail
FOLDER=$1 RESULT=$2 GPUS=$3
shift 3
LOG=${FOLDER:?}/logs/${RESULT:?}.log FAILED=$FOLDER/failed/$RESULT
mkdir -p "$(dirname "$LOG")" "$(dirname "$FAILED")"

# Take GPUS of the visible GPUs. The kernel frees a GPU's lock when the job ends, however it ends.
take_gpus() {
    local gpu lock taken held locks visible=${CUDA_VISIBLE_DEVICES:-}
    [[ $visible ]] || visible=$(nvidia-smi --query-gpu=index --format=csv,noheader | paste -sd,)
    locks=$(realpath -m -- "${TMPDIR:-/tmp}")/mpa-gpus-$UID
    mkdir -p "$locks"
    while true; do
        taken='' held=()
        for gpu in ${visible//,/ }; do
            exec {lock}>>"$locks/${gpu//\//_}"
            if ! flock --nonblock "$lock"; then
                exec {lock}>&-
                continue
            fi
            taken+=${taken:+,}$gpu held+=("$lock")
            if [[ ${#held[@]} == "$GPUS" ]]; then
                export CUDA_VISIBLE_DEVICES=$taken
                return
            fi
        done
        for lock in "${held[@]}"; do exec {lock}>&-; done # too few are free, for example after a kill: try again
        sleep 1
    done
}

# A cluster's scheduler has already given its job GPUs.
if [[ $GPUS -gt 0 && ! ${SLURM_JOB_ID:-} ]]; then take_gpus; fi
if [[ $GPUS -gt 1 ]]; then set -- env GPUS="$GPUS" "$@"; fi
printf '%(%T)T  %s …\n' -1 "$RESULT"
CODE=0 SECONDS=0
"$@" >>"$LOG" 2>&1 </dev/null || CODE=$?
META=$FOLDER/${RESULT%.json}.meta.json
if [[ $CODE == 0 && -f $META ]] && grep -q '"unfinished": [1-9]' "$META"; then
    CODE='temporary errors' # the command asks these again
fi
[[ $CODE != 0 || -f $FOLDER/$RESULT || $RESULT == pace/* ]] || CODE='it wrote no such file'
if [[ $CODE == 0 ]]; then
    printf '%(%T)T  %s: done in %d s\n' -1 "$RESULT" "$SECONDS"
    exit
fi
printf '%s\n' "$(printf ' %q' "$@")" | cut -c2- >"$FAILED"
printf '%(%T)T  %s: FAILED (%s). The end of %s:\n' -1 "$RESULT" "$CODE" "$LOG"
tail -n 5 "$LOG" | sed 's/^/    /'
exit 1
