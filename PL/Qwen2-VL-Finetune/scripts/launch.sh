#!/usr/bin/env bash
# Sourced by the other scripts: `launch FLAGS…` runs ../src/train.py on the GPUs of one or several machines, or on a CPU.
#
#   one machine     all visible GPUs, or the CPU if there is none: one process without DeepSpeed (CPU_PROCESSES=2: two, with it)
#   several         NNODES=2 NODE_RANK=0 MASTER_ADDR=… MASTER_PORT=…: the same command on each (torchrun)
#                   HOSTFILE=hosts or --hostfile hosts: one command; DeepSpeed reaches the others by ssh
#
# SIGTERM and Ctrl-C save a checkpoint and stop, within SHUTDOWN_TIMEOUT seconds (3600). DeepSpeed's launcher (with a hostfile) allows
# 30 seconds for that.
HERE=$(dirname "$(realpath "${BASH_SOURCE[0]}")")
source "$HERE/../../../scripts/environment.sh"

launch() {
    expect 0/1 VERBOSE MEMORY_CHECK
    expect 0+ SHUTDOWN_TIMEOUT
    expect 1+ CPU_PROCESSES
    [[ ${NPROC_PER_NODE:-} == @(gpu|cpu|xpu|auto) ]] || expect 1+ NPROC_PER_NODE
    if [[ " $* " == *" -h "* || " $* " == *" --help "* ]]; then
        python "$HERE/../src/train.py" --help
        printf '\nVariables of %s, with their defaults, or the flags for which they stand:\n' "$(basename "$0")"
        variables "$0"
        exit
    fi
    local hosts=${HOSTFILE:-} flags=() machines=(--standalone --local-addr 127.0.0.1)
    while (($#)); do
        case $1 in
        --hostfile) hosts=$2 && shift ;;
        --hostfile=*) hosts=${1#*=} ;;
        *) flags+=("$1") ;;
        esac
        shift
    done
    if [[ -n ${NNODES:-} && -n $hosts ]]; then
        echo "error: NNODES is for torchrun, a hostfile is for DeepSpeed; give only one." >&2
        return 2
    elif [[ -n $hosts ]]; then
        machines=(--hostfile "$hosts" --master_port "${MASTER_PORT:-29500}")
    elif [[ -n ${NNODES:-} ]]; then
        machines=(--nnodes "$NNODES" --node_rank "${NODE_RANK:-0}" --master_addr "$MASTER_ADDR"
            --master_port "${MASTER_PORT:-29500}")
    fi
    ZERO=$HERE/${ZERO:-zero2}.json exec python "$HERE/../src/launch.py" train "${machines[@]}" -- "${flags[@]}"
}
