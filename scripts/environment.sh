# shellcheck shell=bash
# Sourced by the scripts: which Python runs what, and how a script that runs several commands is stopped.
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
VENV=${VENV:-$ROOT/.venv}                # made by setup.sh; without it, the python that is active
VLLM_VENV=${VLLM_VENV:-$ROOT/.venv-vllm} # made by `setup.sh vllm`
export PATH="$VENV/bin:$PATH"

# python_for FLAGS…: have `python` be that of $VLLM_VENV where the flags of a stage ask for vLLM.
python_for() {
    [[ " ${*//=/ } " =~ " --"(engine|engine-lvlm|ray-engine)" vllm " ]] || return 0
    if [[ ! -x $VLLM_VENV/bin/python ]]; then
        echo "error: $VLLM_VENV: no environment there for --engine vllm. Make it with: bash scripts/setup.sh vllm" >&2
        echo "If yours is elsewhere, name it: VLLM_VENV=DIR." >&2
        exit 1
    fi
    export PATH="$VLLM_VENV/bin:$PATH"
}

# stage FILE FLAGS…: become a stage; with GPUS=N, N processes that share its images, a GPU each.
stage() {
    local file=$ROOT/scripts/$1
    shift
    python_for "$@"
    if [[ ${GPUS:-1} -gt 1 ]]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + GPUS - 1) / GPUS))}
        exec python "$ROOT/PL/Qwen2-VL-Finetune/src/launch.py" --standalone --nproc-per-node "$GPUS" -- "$file" "$@"
    fi
    exec python "$file" "$@"
}

# How a script ends when it is stopped: with 143 after SIGTERM or SIGHUP, with 130 after Ctrl-C, and after the command
# that `run` has started. Bash alone would die at once and leave the command running.
CHILD='' STARTING='' STOPPED=''
stop() {
    STOPPED=$2
    if [[ $CHILD ]]; then
        kill -"$1" "$CHILD" 2>/dev/null || true # it may have ended by itself
    elif [[ ! $STARTING ]]; then
        exit "$STOPPED"
    fi
}
trap 'stop TERM 143' TERM HUP
trap 'stop INT 130' INT

# run CMD…: run a command, which the signals above reach, too.
run() {
    local code=0
    STARTING=1
    set -m # a process group for the command: Ctrl-C reaches it once, from here
    "$@" &
    CHILD=$!
    set +m
    [[ ! $STOPPED ]] || kill -TERM "$CHILD" 2>/dev/null || true # came before there was a child
    while
        wait "$CHILD" && code=0 || code=$?
        kill -0 "$CHILD" 2>/dev/null # the wait was interrupted
    do :; done
    CHILD='' STARTING=''
    [[ ! $STOPPED ]] || exit "$STOPPED"
    return "$code"
}
