#!/usr/bin/env bash
# Opens exports of a tiny run with the oldest transformers and PEFT that can, in an environment of their own (default:
# .venv-old-readers; an argument names another folder), and compares what they compute with what ours computes. Run it
# with this project's environment on PATH. Older transformers cannot read a tokenizer.json of today's tokenizers.
#   bash tests/old_readers.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${1:-.venv-old-readers}"
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
grep '^torch==' constraints.txt > "$environment/torch.txt"
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check -c "$environment/torch.txt" \
  torch transformers==4.45.0 peft==0.5.0
exports="$(mktemp -d)"
trap 'rm -r "$exports"' EXIT
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 HF_HUB_OFFLINE=1 TOKENIZERS_PARALLELISM=false
python -m tests.support.write_exports "$exports"
"$environment/bin/python" tests/support/read_exports.py "$exports"
