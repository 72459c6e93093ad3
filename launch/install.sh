#!/usr/bin/env bash
# Makes .venv in the repository and installs this package with its pinned dependencies. Safe to run again:
# nothing is done while setup.cfg and constraints.txt are what was installed last. An argument names extras: test,
# suite, near-duplicates, benchmark, or several as suite,benchmark.
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
