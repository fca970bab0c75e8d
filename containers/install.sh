#!/bin/bash
# install.sh REQUIREMENTS: install what this Python lacks, and leave alone what its image brought.
#
# A container's torch, Triton and NumPy are built for each other; pinning ours over them would break them. So every
# package that is there is a constraint, and only the missing ones of REQUIREMENTS are installed.
#   PYTHON=python
#   WHEELHOUSE=FOLDER    take packages from there alone (`make wheelhouse`), without internet
set -euo pipefail
PYTHON=${PYTHON:-python}
there=$(mktemp)
missing=$(mktemp)
trap 'rm -f "$there" "$missing"' EXIT
"$PYTHON" -m pip list --format=freeze > "$there"
while read -r line; do
    line=${line%%#*}
    line=${line//[[:space:]]/}
    name=${line%%[=<>!~]*}
    [ -z "$name" ] || grep -qixE "${name//[-_.]/[-_.]}==.*" "$there" || echo "$line" >> "$missing"
done < "$1"
cat "$missing"
[ -s "$missing" ] || exit 0
options=()
if [ -n "${WHEELHOUSE:-}" ]; then options=(--no-index --find-links "$WHEELHOUSE"); fi
# DeepSpeed's ops are built when they are first used (train.preflight builds them once per node).
DS_BUILD_OPS=0 "$PYTHON" -m pip install "${options[@]}" --no-build-isolation --constraint "$there" --requirement "$missing"
