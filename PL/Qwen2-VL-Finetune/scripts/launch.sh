#!/usr/bin/env bash
# Sourced by the scripts here: `launch FLAGS…` trains with ../src/train.py on what this machine, or these machines, have.
#
#   one machine     all visible GPUs; without any, this CPU (CPU_PROCESSES=2 for two ranks)
#   several         HOSTFILE=hosts or --hostfile hosts: one call, DeepSpeed reaches the others by ssh
#                   NNODES=2 NODE_RANK=0 MASTER_ADDR=… MASTER_PORT=…: the same call on each, by torchrun
HERE=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
ROOT=$(cd "$HERE/../../.." && pwd)
export PATH="$ROOT/.venv/bin:$PATH"

launch() {
    # bfloat16 or, on GPUs that only emulate it, float16; a CPU trains in float32.
    local half='"bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"'
    local free_port='import socket; s = socket.socket(); s.bind(("", 0)); print(s.getsockname()[1])'
    local precision devices=() processes=gpu hosts=${HOSTFILE:-} flags=()
    while (($#)); do
        case $1 in
        --hostfile) hosts=$2 && shift ;;
        --hostfile=*) hosts=${1#*=} ;;
        *) flags+=("$1") ;;
        esac
        shift
    done
    precision=$(python -c "import torch; print($half if torch.cuda.device_count() else 'use_cpu')")
    if [[ $precision == use_cpu ]]; then
        export DS_ACCELERATOR=cpu
        processes=${CPU_PROCESSES:-1}
        devices=(--num_accelerators "$processes")
    fi
    set -- "$HERE/../src/train.py" --deepspeed "$HERE/${ZERO:-zero2}.json" "--$precision" True "${flags[@]}"
    if [[ -n ${NNODES:-} && -n $hosts ]]; then
        echo "error: NNODES is for torchrun, a hostfile for DeepSpeed; give one of them." >&2
        return 2
    elif [[ -n ${NNODES:-} ]]; then
        torchrun --nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --nproc_per_node "${NPROC_PER_NODE:-$processes}" \
            --master_addr "$MASTER_ADDR" --master_port "${MASTER_PORT:-29500}" "$@"
    elif [[ -n $hosts ]]; then
        deepspeed --hostfile "$hosts" --master_port "${MASTER_PORT:-29500}" "$@"
    else # trainings on one machine need a port each
        deepspeed "${devices[@]}" --master_port "${MASTER_PORT:-$(python -c "$free_port")}" "$@"
    fi
}
