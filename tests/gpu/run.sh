#!/usr/bin/env bash
# The tests that need a GPU, in the environment that is there (no pip): `bash tests/run.sh gpu` runs all parts, `bash
# tests/run.sh gpu 1 3` only these (tests/gpu/test_1_*, ...). PYTHON=... takes another interpreter than .venv's. Leaves
# build/gpu/report.md and report.json. Written without a GPU, and not run on one yet.
set -euo pipefail
cd "$(dirname "$0")/../.."
if ! compgen -G '/dev/nvidia[0-9]*' > /dev/null && [ ! -e /dev/dxg ]; then
  echo "gpu: nothing was run. These tests need an NVIDIA GPU (/dev/nvidia0), its driver, a CUDA build of torch, the"
  echo "packages of setup.cfg and pytest; see docs/gpu.md. They install nothing."
  exit 0
fi
python="${PYTHON:-.venv/bin/python}"
[ -n "${PYTHON:-}" ] || [ -x "$python" ] || python=python3
export GPU_TESTS=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false PYTHONPATH="$PWD${PYTHONPATH:+:$PYTHONPATH}"
files=()
for part in "$@"; do files+=(tests/gpu/test_"$part"_*.py); done
exec "$python" -m pytest -v "${files[@]:-tests/gpu}"
