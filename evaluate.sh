#!/usr/bin/env bash
# Stage 4, callable from the repository root. scripts/evaluate.sh lists the settings.
exec bash "$(dirname "$(realpath "${BASH_SOURCE[0]}")")/scripts/evaluate.sh" "$@"
