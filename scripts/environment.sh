# shellcheck shell=bash
# Sourced by the scripts: selects the Python environment, and handles signals in scripts that run several commands.
ROOT=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
VENV=$(realpath -ms -- "${VENV:-$ROOT/.venv}")                # made by setup.sh; if it is missing, the active python is used
VLLM_VENV=$(realpath -ms -- "${VLLM_VENV:-$ROOT/.venv-vllm}") # made by `setup.sh vllm`
export PATH="$VENV/bin:$PATH"

# variables SCRIPT: print the variables that it reads, with their defaults, or the flags for which they stand.
variables() {
    if grep -q '^about DATASET=' "$1"; then
        unset DATASET LVLM SVLM RUN
        about DATASET=dataset LVLM=lvlm SVLM=svlm RUN=folder
        printf '  %s\n' "DATASET=$DATASET" "LVLM=$LVLM" "SVLM=$SVLM" "RUN=$(basename "$RUN")"
    fi
    sed -nE -e 's/^(export )?([A-Z_]+=\$\{.*)$/  \2/p' -e 's/^ +\$\{([A-Z_]+):\+(--[a-z_-]+)[^#]*(#.*)?$/  \1  \2  \3/p' "$1"
}

# options SCRIPT ARGUMENTS…: of a script that is set by variables: -v, and -h, which prints its header and its variables.
options() {
    local script=$1
    shift
    for argument; do
        case $argument in
        -v | --verbose) export VERBOSE=1 ;;
        -h | --help)
            sed -n '2,/^$/{/^#/s/^# \{0,1\}//p}' "$script"
            printf '\nVariables, with their defaults:\n'
            variables "$script"
            exit 0
            ;;
        *)
            echo "error: $argument: $(basename "$script") takes only -v and -h; its settings are variables, see -h." >&2
            exit 2
            ;;
        esac
    done
}

# expect KIND NAMES…: each of these variables is empty, unset, or of that kind; else an error says what it is. KIND: 0/1, a
# whole number (0+, 1+), or a number (any). Before bash computes with them, and before anything runs.
expect() {
    local name kind pattern
    case $1 in
    0/1) pattern='[01]' kind='0 or 1' ;;
    0+) pattern='0|[1-9][0-9]{0,14}' kind='a whole number' ;;
    1+) pattern='[1-9][0-9]{0,14}' kind='a whole number above 0' ;;
    any) pattern='([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?' kind='a number' ;;
    esac
    for name in "${@:2}"; do
        if [[ ${!name:-} && ! ${!name} =~ ^($pattern)$ ]]; then
            printf 'error: %s is %q: give %s.\n' "$name" "${!name}" "$kind" >&2
            exit 2
        fi
    done
}

# The switches and numbers of mpa.sh and what it calls.
expect_settings() {
    expect 0/1 GUARD REMEDY REPORT VERBOSE MEMORY_CHECK
    expect 0+ GPUS SEED
    expect 1+ LIMIT BATCH_SIZE PL_BATCH_SIZE ACCUMULATION CPU_PROCESSES MIN_PIXELS MAX_PIXELS MAX_TILES
    expect any EPOCHS LEARNING_RATE MERGER_LR VISION_LR
    if [[ ! -f $ROOT/PL/Qwen2-VL-Finetune/scripts/${ZERO:-zero2}.json ]]; then
        printf 'error: ZERO is %q: give zero2, zero2_offload, zero3 or zero3_offload.\n' "$ZERO" >&2
        exit 2
    fi
}

# about VARIABLE=NAME…: set each variable to what mpa.runs.layout says of the run: a path, or a name by default.
about() {
    local said pair
    said=$(PYTHONPATH=$ROOT python -P -m mpa.runs.layout ${RUN:+--run="$RUN"} ${DATASET:+--dataset="$DATASET"} \
        ${LVLM:+--lvlm="$LVLM"} ${SVLM:+--svlm="$SVLM"} "${@#*=}")
    for pair; do read -r "${pair%%=*}"; done <<<"$said"
}

# title TEXT: the header of a stage.
title() { printf '\n== %s\n' "$1"; }

# python_for FLAGS…: use the python of $VLLM_VENV if a stage's flags select the engine vllm.
python_for() {
    [[ " ${*//=/ } " =~ " --"(engine|engine-lvlm|ray-engine)" vllm " ]] || return 0
    if [[ ! -x $VLLM_VENV/bin/python ]]; then
        echo "error: $VLLM_VENV: no environment for --engine vllm. Make it with: bash scripts/setup.sh vllm" >&2
        echo "If yours is elsewhere, set VLLM_VENV=DIR." >&2
        exit 1
    fi
    export PATH="$VLLM_VENV/bin:$PATH"
}

# stage FILE FLAGS…: replace this shell by a stage. With GPUS=N, it runs in N processes, one per GPU.
stage() {
    local file=$ROOT/scripts/$1
    shift
    expect 0/1 VERBOSE MEMORY_CHECK
    expect 0+ GPUS
    python_for "$@"
    if [[ " $* " == *" -h "* || " $* " == *" --help"* ]]; then
        python "$file" "$@"
        printf '\nVariables of %s, and the flags for which they stand:\n' "$(basename "$0")"
        variables "$0"
        exit
    fi
    if [[ ${GPUS:-1} -gt 1 ]]; then
        export OMP_NUM_THREADS=${OMP_NUM_THREADS:-$((($(nproc) + GPUS - 1) / GPUS))}
        exec python "$ROOT/PL/Qwen2-VL-Finetune/src/launch.py" --standalone --nproc-per-node "$GPUS" -- "$file" "$@"
    fi
    exec python "$file" "$@"
}

# A stopped script passes the signal to the command that `run` started, waits for it, and exits with 143 (SIGTERM,
# SIGHUP) or 130 (Ctrl-C). Bash alone would exit at once and leave the command running.
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

# run CMD…: run a command and pass the signals above to it.
run() {
    local code=0
    STARTING=1
    set -m # run the command in its own process group, so that it gets Ctrl-C only once, from `stop`
    "$@" &
    CHILD=$!
    set +m
    [[ ! $STOPPED ]] || kill -TERM "$CHILD" 2>/dev/null || true # the signal came before the child started
    while
        wait "$CHILD" && code=0 || code=$?
        kill -0 "$CHILD" 2>/dev/null # the wait was interrupted
    do :; done
    CHILD='' STARTING=''
    [[ ! $STOPPED ]] || exit "$STOPPED"
    return "$code"
}
