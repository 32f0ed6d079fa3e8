#!/usr/bin/env bash
# Install what is missing and run all checks: ruff, shellcheck, pytest. Arguments are passed to pytest.
# The slow tests are left out: whole trainings, the demo, whole runs that are killed. `bash scripts/test.sh -m ''` runs all.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
bash scripts/setup.sh dev
export PATH="$PWD/.venv/bin:$PATH"

ruff check .
ruff format --check .
git ls-files -z '*.sh' .ci/run | xargs -0 shellcheck
python -m pytest -n 2 --dist loadfile -m "not slow" "$@" # two workers, whole files each
