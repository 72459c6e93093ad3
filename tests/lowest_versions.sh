#!/usr/bin/env bash
# Runs the fast tests with the lowest version of each dependency that setup.cfg allows, in an environment of its own
# (default: .venv-lowest; an argument names another folder). What has no lower bound there gets the newest version.
#   bash tests/lowest_versions.sh [FOLDER]
set -euo pipefail
cd "$(dirname "$0")/.."
environment="${1:-.venv-lowest}"
[ -x "$environment/bin/python" ] || "${PYTHON:-python3}" -m venv "$environment"
lowest="$environment/lowest.txt"
"$environment/bin/python" - > "$lowest" << 'END'
import configparser
import re

setup = configparser.ConfigParser()
setup.read("setup.cfg")
lines = setup["options"]["install_requires"] + setup["options.extras_require"]["sample"]
for line in filter(None, map(str.strip, lines.splitlines())):
    bound = re.fullmatch(r"([\w-]+)(>=|==)([\w.]+)(\.\*|,<.*)?", line)  # the only forms in use; others fail here
    name, _, version, rest = bound.groups()
    print(f"{name}=={version}{rest if rest == '.*' else ''}")
END
"$environment/bin/python" -m pip install --quiet --disable-pip-version-check -c "$lowest" -e ".[test]"
export OMP_NUM_THREADS=1 TORCHDYNAMO_DISABLE=1 PATH="$PWD/$environment/bin:$PATH" HF_HUB_OFFLINE=1
export TOKENIZERS_PARALLELISM=false
exec "$environment/bin/python" -m pytest -m "not slow"
