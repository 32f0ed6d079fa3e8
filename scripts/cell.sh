#!/usr/bin/env bash
# A job of scripts/reproduce.sh: `cell.sh FOLDER RESULT GPUS CMD…` runs CMD on that many GPUs of its own.
# What it prints goes to FOLDER/logs/RESULT.log. A failure leaves the command that repeats it in FOLDER/failed/RESULT.
set -euo pipefail
FOLDER=$1 RESULT=$2 GPUS=$3
shift 3
LOG=${FOLDER:?}/logs/${RESULT:?}.log FAILED=$FOLDER/failed/$RESULT
mkdir -p "$(dirname "$LOG")" "$(dirname "$FAILED")"
COMMAND=("$@")
if [[ $GPUS -gt 1 ]]; then COMMAND=(env GPUS="$GPUS" "$@"); fi

failed() { # failed WHY
    printf '%s\n' "$(printf ' %q' "${COMMAND[@]}")" | cut -c2- >"$FAILED"
    printf '%(%T)T  %s: FAILED (%s). The end of %s:\n' -1 "$RESULT" "$1" "$LOG"
    tail -n 5 "$LOG" | sed 's/^/    /'
    exit 1
}

# Take GPUS of those in MPA_GPUS, "NAME=UUID …" with names for CUDA_VISIBLE_DEVICES. A lock has the UUID's name, which is the same in all
# containers and differs between nodes. The kernel frees it when the job ends, however it ends. Other users have locks of their own.
take_gpus() {
    local gpu uuid lock taken held locks visible
    read -ra visible <<<"$MPA_GPUS"
    if ((GPUS > ${#visible[@]})); then
        echo "error: it needs $GPUS GPUs, and ${#visible[@]} are visible: ${visible[*]%%=*}." >>"$LOG"
        failed 'too few GPUs'
    fi
    locks=$(realpath -m -- "${TMPDIR:-/tmp}")/mpa-gpus-$UID
    mkdir -p "$locks" 2>>"$LOG" || true
    if [[ ! -d $locks || ! -O $locks || ! -w $locks ]]; then
        echo "error: $locks: is no folder of yours for the locks of GPUs. Name another place with TMPDIR=DIR." >>"$LOG"
        failed 'no locks'
    fi
    while true; do
        taken='' held=()
        for gpu in "${visible[@]}"; do
            uuid=${gpu#*=}
            exec {lock}>>"$locks/${uuid//\//_}"
            if ! flock --nonblock "$lock"; then
                exec {lock}>&-
                continue
            fi
            taken+=${taken:+,}${gpu%%=*} held+=("$lock")
            if [[ ${#held[@]} == "$GPUS" ]]; then
                export CUDA_VISIBLE_DEVICES=$taken
                return
            fi
        done
        for lock in "${held[@]}"; do exec {lock}>&-; done # too few are free, for example after a kill: try again
        sleep 1
    done
}

# Without MPA_GPUS a cluster's scheduler has given this job its GPUs. Inside salloc and sbatch jobs of one reproduce.sh share them.
if [[ $GPUS -gt 0 && ${MPA_GPUS:-} ]]; then take_gpus; fi
printf '%(%T)T  %s …\n' -1 "$RESULT"
CODE=0 SECONDS=0
"${COMMAND[@]}" >>"$LOG" 2>&1 </dev/null || CODE=$?
META=$FOLDER/${RESULT%.json}.meta.json
if [[ $CODE == 0 && -f $META ]] && grep -q '"unfinished": [1-9]' "$META"; then
    CODE='temporary errors' # the command asks these again
fi
[[ $CODE != 0 || -f $FOLDER/$RESULT || $RESULT == pace/* ]] || CODE='it wrote no such file'
[[ $CODE == 0 ]] || failed "$CODE"
printf '%(%T)T  %s: done in %d s\n' -1 "$RESULT" "$SECONDS"
