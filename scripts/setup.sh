#!/usr/bin/env bash
# Make the environment, .venv, when it is missing or requirements.txt has changed: with uv, else with pip.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
STAMP=$ROOT/.venv/requirements.txt

if ! cmp -s "$ROOT/requirements.txt" "$STAMP"; then
    echo "Installing requirements.txt into .venv (some 6 GB with torch's CUDA libraries) …"
    if command -v uv >/dev/null; then
        "$ROOT/.venv/bin/python" --version >/dev/null 2>&1 || uv venv --clear --quiet --python '>=3.11,<3.14' "$ROOT/.venv"
        VIRTUAL_ENV=$ROOT/.venv uv pip install --quiet -r "$ROOT/requirements.txt"
    else
        for PYTHON in python3 python3.13 python3.12 python3.11 none; do
            [[ $PYTHON != none ]] || { echo "error: no Python 3.11 to 3.13 found; install one." >&2 && exit 1; }
            "$PYTHON" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 13))' 2>/dev/null && break
        done
        # An environment without pip is one that was interrupted, or uv's.
        "$ROOT/.venv/bin/python" -m pip --version >/dev/null 2>&1 || "$PYTHON" -m venv "$ROOT/.venv"
        "$ROOT/.venv/bin/python" -m pip install --quiet --disable-pip-version-check -r "$ROOT/requirements.txt"
    fi
    cp "$ROOT/requirements.txt" "$STAMP"
fi
