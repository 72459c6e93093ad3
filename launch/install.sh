#!/usr/bin/env bash
# Creates .venv in the clone and installs this package, editable, with pinned dependencies. Safe to run again: does
# nothing while setup.cfg, constraints.txt and pyproject.toml are those of the last install. An argument names extras:
# sample (the quickstart's base and tasks), suite, near-duplicates, docs, benchmark, test (all but benchmark), or several
# as suite,benchmark. TORCH_INDEX=URL takes another build of torch, for older drivers
# (docs/gpu.md); later installs keep it.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
stamp=".venv/installed${extras:+-$extras}"
wanted="$({ cat setup.cfg constraints.txt pyproject.toml; printf %s "${TORCH_INDEX:-}"; } | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi
echo "installing into .venv (once; a minute or two)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
pip() { .venv/bin/python -m pip "$@" --quiet --quiet --disable-pip-version-check; }
if [ -n "${TORCH_INDEX:-}" ]; then
  pip uninstall --yes torch # pip takes another build of the same version for what was asked
  pip install -c constraints.txt -e ".${extras:+[$extras]}" --extra-index-url "$TORCH_INDEX"
else
  pip install -c constraints.txt -e ".${extras:+[$extras]}"
fi
echo "$wanted" > "$stamp"
