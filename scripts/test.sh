#!/usr/bin/env bash
# Set up what is missing and run the linters and the tests. Arguments go to pytest:
#   bash scripts/test.sh             all but the slow tests: minutes on two cores
#   bash scripts/test.sh -m slow     whole trainings, runs of all stages, and kills of several processes
#   bash scripts/test.sh -m ''       all
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
python -m pytest -n 2 --dist loadfile -m 'not slow' "$@" # a file at a time on each of two cores
