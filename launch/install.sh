#!/usr/bin/env bash
# Creates .venv in the clone and installs this package, editable, with pinned dependencies. Safe to run again: does
# nothing while setup.cfg, constraints.txt and pyproject.toml are those of the last install. An argument names extras:
# sample (the quickstart's base and tasks), suite, near-duplicates, docs, benchmark, test (all but benchmark), or several
# as suite,benchmark.
set -euo pipefail
cd "$(dirname "$0")/.."
extras="${1:-}"
stamp=".venv/installed${extras:+-$extras}"
wanted="$(cat setup.cfg constraints.txt pyproject.toml | sha256sum)"
if [ "$(cat "$stamp" 2>/dev/null || true)" = "$wanted" ]; then exit 0; fi
echo "installing into .venv (once; a minute or two)"
[ -x .venv/bin/python ] || "${PYTHON:-python3}" -m venv .venv
.venv/bin/python -m pip install --quiet --quiet --disable-pip-version-check -c constraints.txt -e ".${extras:+[$extras]}"
echo "$wanted" > "$stamp"
