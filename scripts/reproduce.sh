#!/usr/bin/env bash
# Run all cells of an experiment file: PA, PI, PL and evaluate, sharing what cells have in common.
#   bash scripts/reproduce.sh [experiments/NAME.yaml] [FLAGS…]   results go to results/NAME
#   … --plan           what would run: cells, requests, sharing, time, memory; no model is loaded
#   … pace             first measure the time with --dry-run of the stages; --plan then shows hours
#   … --dry-run, --executor slurm --jobs 20 --default-resources slurm_partition=gpu, …: flags of Snakemake
# The same command continues what was stopped or killed, and tries failed jobs again. Ctrl-C stops the jobs; SIGTERM lets those
# that run finish. Each GPU has a job (GPUS=N or $CUDA_VISIBLE_DEVICES: not all GPUs; GPUS=0: the CPU); on a CPU JOBS (1) run at once.
# RESULTS=DIR is another folder for the results. It ends with an HTML report; REPORT=0 leaves it out.
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

expect 0/1 REPORT VERBOSE MEMORY_CHECK
expect 0+ GPUS
expect 1+ JOBS
FILE=$ROOT/experiments/mini.yaml
if [[ ${1:-} == [!-]*.y*ml ]]; then
    FILE=$(realpath -m -- "$1")
    shift
fi
NAME=$(basename -- "${FILE%.*}")
RESULTS=$(realpath -m -- "${RESULTS:-$ROOT/results/$NAME}")
fail() {
    printf 'error: %q: %s\n' "$RESULTS" "$1" >&2
    exit 1
}
CANNOT="no folder for the results can be made or written here. Name another with RESULTS=DIR."
PARENT=$RESULTS
while [[ ! -e $PARENT ]]; do PARENT=$(dirname "$PARENT"); done
[[ $RESULTS != *[[:cntrl:]]* && -d $PARENT && -w $PARENT ]] || fail "$CANNOT"

run bash "$ROOT/scripts/setup.sh" reproduce
export PYTHONPATH=$ROOT${PYTHONPATH:+:$PYTHONPATH} PYTHONDONTWRITEBYTECODE=1
if [[ ${1:-} == --plan ]]; then exec python -P -m experiments.plan "$FILE" "$RESULTS"; fi
python -P -m experiments.definition "$FILE"

{ mkdir -p "$RESULTS" && cd "$RESULTS"; } 2>/dev/null || fail "$CANNOT"
# The kernel releases the lock, however this ends.
exec {LOCK}>>"$RESULTS/.lock"
flock --nonblock "$LOCK" || fail "another reproduce.sh is running it; wait for it or stop it."
# A killed training saves a checkpoint before it ends.
left() { grep -lsxzF "MPA_RESULTS=$RESULTS" /proc/[0-9]*/environ | cut -d/ -f3 | paste -sd' '; }
[[ ! $(left) ]] || echo "Waiting for processes of a killed reproduce.sh to end: $(left)"
while [[ $(left) ]]; do sleep 1; done
export MPA_RESULTS=$RESULTS

exec python "$ROOT/scripts/reproduce.py" "$RESULTS" "$FILE" "$@"
