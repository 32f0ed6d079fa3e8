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

# run CMD…: run a command. SIGTERM, SIGHUP and Ctrl-C reach it, and the script ends once the command has ended.
# Bash alone would die at once and leave the command running.
run() {
    local child='' code=0 heard='' signal=''
    trap 'heard=1 signal=143; [[ -z $child ]] || kill -TERM "$child" 2>/dev/null' TERM HUP
    trap 'heard=1 signal=130; [[ -z $child ]] || kill -INT "$child" 2>/dev/null' INT
    set -m # a process group for the command: Ctrl-C reaches it once, from here
    "$@" &
    child=$!
    set +m
    [[ -z $signal ]] || kill -TERM "$child" 2>/dev/null # came before there was a child
    while
        heard=''
        wait "$child" && code=0 || code=$?
        [[ $heard ]] # the wait was interrupted
    do :; done
    trap - TERM HUP INT
    [[ -z $signal ]] || exit "$signal"
    return "$code"
}
