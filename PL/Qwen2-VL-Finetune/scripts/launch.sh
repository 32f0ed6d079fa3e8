#!/usr/bin/env bash
# Sourced by the other scripts: `launch FLAGS…` runs ../src/train.py on the GPUs of one or several machines, or on a CPU.
#
#   one machine     all visible GPUs, or the CPU if there is none (CPU_PROCESSES=2 for two ranks)
#   several         NNODES=2 NODE_RANK=0 MASTER_ADDR=… MASTER_PORT=…: the same command on each (torchrun)
#                   HOSTFILE=hosts or --hostfile hosts: one command; DeepSpeed reaches the others by ssh
#
# SIGTERM and Ctrl-C save a checkpoint and stop. DeepSpeed's launcher (with a hostfile) allows 30 seconds for that.
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$HERE/../../../scripts/environment.sh"

launch() {
    expect 0/1 VERBOSE MEMORY_CHECK
    expect 1+ CPU_PROCESSES
    # bfloat16; float16 on GPUs that only emulate bfloat16; float32 on a CPU.
    local half='"bf16" if torch.cuda.is_bf16_supported(including_emulation=False) else "fp16"'
    local precision processes=gpu hosts=${HOSTFILE:-} flags=() machines=(--standalone --local-addr 127.0.0.1)
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
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$(($(nproc) / processes > 1 ? $(nproc) / processes : 1))}
    fi
    set -- "$HERE/../src/train.py" --deepspeed "$HERE/${ZERO:-zero2}.json" "--$precision" True "${flags[@]}"
    if [[ -n ${NNODES:-} && -n $hosts ]]; then
        echo "error: NNODES is for torchrun, a hostfile is for DeepSpeed; give only one." >&2
        return 2
    elif [[ -n $hosts ]]; then
        exec deepspeed --hostfile "$hosts" --master_port "${MASTER_PORT:-29500}" "$@"
    elif [[ -n ${NNODES:-} ]]; then
        machines=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR"
            --master_port "${MASTER_PORT:-29500}")
    fi
    exec python "$HERE/../src/launch.py" "${machines[@]}" --nproc_per_node "${NPROC_PER_NODE:-$processes}" \
        --shutdown-timeout "${SHUTDOWN_TIMEOUT:-3600}" "$@"
}
