#!/usr/bin/env bash
# Try on this machine what only a GPU can tell, in ten minutes at most: the driver, each GPU, replies and losses against those of
# the CPU, memory, speed, and vLLM if it is installed. A part that fails does not end the others. The end is a text for a report,
# without names of users, machines and folders. The exit code is 1 if a part failed.
#   bash scripts/check_gpu.sh
#   DEVICE=cpu bash scripts/check_gpu.sh     all parts in miniature on the CPU, to try this script
set -euo pipefail
source "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/environment.sh"

DEVICE=${DEVICE:-cuda:0} # or cpu; of several GPUs the first visible one is measured
options "$0" "$@"
if [[ $DEVICE != @(cuda:0|cpu) ]]; then
    printf 'error: DEVICE is %q: give cuda:0 or cpu. CUDA_VISIBLE_DEVICES names another GPU.\n' "$DEVICE" >&2
    exit 2
fi
cd "$ROOT"
export DEVICE HF_HUB_OFFLINE=1 PYTHONPATH=$ROOT
python -c 'import pytest, torch' 2>/dev/null || run bash scripts/setup.sh dev
if [[ $DEVICE == cpu ]]; then
    export CUDA_VISIBLE_DEVICES=''
    SLOWER=5 BENCHMARK=(--device cpu --shape tiny --images 4 --workers 1 --train-samples 12 --train-batch 4)
else
    SLOWER=1 BENCHMARK=(--shape small --images 64 --train-samples 48)
    python -c 'from mpa.models.loading import pick_device; from mpa.stages import cli; cli.run(lambda: pick_device("cuda:0"))' || {
        echo 'A GPU is needed here; DEVICE=cpu tries this script without one.' >&2
        exit 1
    }
fi
OUT=$(mktemp -d)
trap 'rm -rf "$OUT"' EXIT
export TMPDIR=$OUT # parts that are ended leave files
REPORT='' FAILED=0

# part NAME SECONDS CMD…: run a command for that time at most; add to the report what it prints, and if it fails the end of its errors.
part() {
    local name=$1 limit=$(($2 * SLOWER)) code=0 said verdict=ok
    shift 2
    title "$name (at most $limit seconds)"
    SECONDS=0
    run timeout --kill-after=10 "$limit" "$@" >"$OUT/out" 2>"$OUT/errors" || code=$?
    said=$(<"$OUT/out")
    if [[ $code != 0 ]]; then
        FAILED=1 verdict="FAILED (exit code $code)"
        ((SECONDS < limit)) || verdict="FAILED (no end after $limit seconds)"
        said+=$'\n'$(tail -n 20 "$OUT/errors")
    fi
    printf '%s\n%s, %s seconds\n' "$said" "$verdict" "$SECONDS"
    REPORT+=$'\n'"### $name: $verdict, $SECONDS seconds"$'\n'"$said"$'\n'
}

mapfile -t TESTS < <(grep -rlE 'mark\.gpu\b' --include='test_*.py' tests)
PYTEST=(python -m pytest -q -s --tb=short -p no:cacheprovider -m gpu "${TESTS[@]}")
if [[ $DEVICE != cpu ]]; then
    part driver 20 nvidia-smi --format=csv \
        --query-gpu=index,name,driver_version,compute_cap,memory.total,memory.free,mig.mode.current
fi
part torch 30 python -c 'import torch; print(torch.__version__, "CUDA", torch.version.cuda, torch.cuda.get_arch_list())'
part 'replies and memory' 130 "${PYTEST[@]}" -k 'not training'
part training 120 "${PYTEST[@]}" -k training
part speed 200 python benchmarks/gpu.py "${BENCHMARK[@]}"
if [[ -x $VLLM_VENV/bin/python ]]; then
    part vllm 100 "$VLLM_VENV/bin/python" benchmarks/engines.py --requests 100 --rounds 1 --dtype float32
else
    REPORT+=$'\n### vllm: not installed (bash scripts/setup.sh vllm)\n'
fi

for name in "$ROOT" "$OUT" "$HOME" "$(hostname)"; do
    [[ ${#name} -lt 4 ]] || REPORT=${REPORT//"$name"/…}
done
title 'The text for a report'
printf 'commit %s\n%s\n' "$(git describe --always --dirty 2>/dev/null || echo 'not known')" "$REPORT"
exit "$FAILED"
