#!/usr/bin/env bash
# Everything that only a GPU can show, in one command, within a time budget:
#     bash benchmarks/gpu.sh [--dry-run] [--seconds N] [--out DIR] [--wheels DIR]
# Works from a bare clone, without a network; needs torch and triton in ${PYTHON:-python3}. See benchmarks/gpu.py.
set -euo pipefail
here=$PWD
cd "$(dirname "${BASH_SOURCE[0]}")/.."
exec "${PYTHON:-python3}" -u -m benchmarks.gpu --relative-to "$here" "$@"
