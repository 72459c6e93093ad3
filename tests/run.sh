#!/usr/bin/env bash
# Installs what is missing, then runs the tests: `bash tests/run.sh` runs all of them, `bash tests/run.sh fast` those
# without process groups, whole commands or real models, `bash tests/run.sh fuzz` those of damaged input with 20,000
# examples, `bash tests/run.sh gpu` those that need a GPU (tests/gpu/run.sh). Further arguments go to pytest. The tests
# in tests/cluster/emulated_hosts need root and some Debian packages; where these are missing, they are skipped.
set -euo pipefail
cd "$(dirname "$0")/.."
if [ "${1:-}" = gpu ]; then shift; exec bash tests/gpu/run.sh "$@"; fi
bash launch/install.sh test
# One thread per process: the distributed tests run 2 and 4 ranks, perhaps on 2 cores. Without torch.compile, which
# bitsandbytes sets up at import but no CPU uses, each of some hundred processes starts a second sooner.
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
if [ "${1:-}" = fast ]; then shift; exec .venv/bin/python -m pytest -m "not slow" "$@"; fi
if [ "${1:-}" = fuzz ]; then
  shift
  FUZZ_EXAMPLES="${FUZZ_EXAMPLES:-20000}" exec .venv/bin/python -m pytest tests/fuzz "$@"
fi
bash tests/support/cluster/install.sh
# As many workers as there are long folders, see tests/conftest.py.
exec .venv/bin/python -m pytest -n 3 "$@"
