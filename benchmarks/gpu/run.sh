#!/bin/bash
# run.sh [ARGUMENTS...]: install the carried wheels beside the machine's own packages and run `python -m benchmarks.gpu`.
#   GPU_WHEELS=.gpu-wheels    what wheels.sh made; nothing is installed where there is no such folder
#   PYTHON=python3            the Python that holds torch
set -euo pipefail
cd "$(dirname "$0")/../.."
PYTHON=${PYTHON:-python3}
WHEELS=${GPU_WHEELS:-.gpu-wheels}
if compgen -G "$WHEELS/*.whl" > /dev/null; then
    site=$(mktemp -d)
    trap 'rm -rf "$site"' EXIT
    "$PYTHON" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl
    export PYTHONPATH="$site${PYTHONPATH:+:$PYTHONPATH}"
fi
export PYTHONUNBUFFERED=1
"$PYTHON" -m benchmarks.gpu "$@"
