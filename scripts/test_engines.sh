#!/usr/bin/env bash
# The tests of the vllm and ray engines, which need packages that scripts/test.sh does not install. For a scheduled job:
# the first call downloads some 12 GB. VLLM_VENV=DIR and VENV=DIR name environments that are there already.
set -euo pipefail
ROOT=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
cd "$ROOT"
VENV=${VENV:-$ROOT/.venv} VLLM_VENV=${VLLM_VENV:-$ROOT/.venv-vllm}

bash scripts/setup.sh vllm
"$VLLM_VENV/bin/python" -m pytest tests/test_vllm.py tests/test_vllm_stages.py "$@"
bash scripts/setup.sh dev
bash scripts/setup.sh ray
"$VENV/bin/python" -m pytest tests/test_ray.py "$@"
