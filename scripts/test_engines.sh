#!/usr/bin/env bash
# Test the engines vllm and ray in their own environments, .venv-vllm and .venv; arguments are passed to pytest.
# They take longer than the other tests, so CI leaves them to a schedule, for example once a night with cron:
#   0 3 * * * cd /path/to/mpa && bash scripts/test_engines.sh
set -euo pipefail
cd "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/.."
source scripts/environment.sh
run bash scripts/setup.sh vllm
run bash scripts/setup.sh dev
run bash scripts/setup.sh ray
CODE=0
run "$VLLM_VENV/bin/python" -m pytest "$@" tests/engines/test_vllm*.py || CODE=$?
run python -m pytest "$@" tests/engines/test_ray.py || CODE=$?
exit "$CODE"
