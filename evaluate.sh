#!/usr/bin/env bash
# Stage 4, from the top: scripts/evaluate.sh says what can be set.
exec bash "$(dirname "${BASH_SOURCE[0]}")/scripts/evaluate.sh" "$@"
