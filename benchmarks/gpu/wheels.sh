#!/bin/bash
# wheels.sh [FOLDER]: what a GPU machine without internet lacks, as wheels for its Python (make gpu-wheels).
#
# For a machine that has torch, Triton, transformers, pytest and the usual scientific packages, such as NVIDIA's
# containers. DeepSpeed is built here without its compiled ops: they are built on the machine when they are needed.
#   GPU_PYTHON=3.12        Python there
#   PYTHON=.venv/bin/python   Python here, with torch: DeepSpeed's build asks it for its version
set -euo pipefail
cd "$(dirname "$0")/../.."
FOLDER=${1:-.gpu-wheels}
GPU_PYTHON=${GPU_PYTHON:-3.12}
PYTHON=${PYTHON:-.venv/bin/python}

pinned() { grep -oE "^$1==[^ ;#]+" requirements.lock; }

rm -rf "$FOLDER"
mkdir -p "$FOLDER"
# Sources only, the same for every Python.
DS_BUILD_OPS=0 "$PYTHON" -m pip wheel -q --no-deps --no-build-isolation -w "$FOLDER" "$(pinned deepspeed)"
"$PYTHON" -m pip wheel -q --no-deps -w "$FOLDER" antlr4-python3-runtime==4.9.3
platforms=()
for version in manylinux_2_28 manylinux_2_27 manylinux_2_24 manylinux_2_17 manylinux2014 manylinux_2_5 manylinux1; do
    platforms+=(--platform "${version}_x86_64")
done
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$GPU_PYTHON" --implementation cp \
    "${platforms[@]}" -d "$FOLDER" \
    "$(pinned hydra-core)" "$(pinned omegaconf)" "$(pinned datasets)" "$(pinned gguf)" liger-kernel \
    dill multiprocess hjson annotated-types typing-inspection
# pydantic names the one pydantic-core that it works with.
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$GPU_PYTHON" --implementation cp \
    "${platforms[@]}" -d "$FOLDER" pydantic
core=$(unzip -p "$FOLDER"/pydantic-[0-9]*.whl '*/METADATA' | sed -n 's/^Requires-Dist: pydantic-core==\([^ ;]*\).*/\1/p' | head -1)
"$PYTHON" -m pip download -q --no-deps --only-binary=:all: --python-version "$GPU_PYTHON" --implementation cp \
    "${platforms[@]}" -d "$FOLDER" "pydantic-core==$core"
du -sh "$FOLDER"
