#!/usr/bin/env bash
''':'
# Trains a recipe. Shell and Python at once, so that every launcher can start this one file:
#   bash launch/train.sh RECIPE [num_gpus=N | hostfile=F] [retries=N] [min_nodes=N] [check=false] [key.path=value ...]
#       the same as `teamlora launch`: on all GPUs of this machine, on num_gpus of them (or as many CPU ranks), or on the
#       nodes of a hostfile. Restarts after a fault, up to `retries` times. On SIGTERM, SIGUSR1 or Ctrl-C every rank
#       saves and ends with exit status 75; the next start continues from there
#   deepspeed [--num_gpus N | --hostfile F] launch/train.sh RECIPE [key.path=value ...]
#   deepspeed --no_python launch/train.sh RECIPE ...                 starts it as a program instead
#   torchrun --nproc_per_node N launch/train.sh RECIPE ...
set -euo pipefail
here="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
python="$here/.venv/bin/python"
[ -x "$python" ] || python="$(command -v python3)"
# With RANK set by a launcher this is one rank of a run. Otherwise this is the launch.
if [ -n "${RANK:-}" ]; then exec "$python" "${BASH_SOURCE[0]}" "$@"; fi
exec "$python" "$here/trainer/__main__.py" launch "$@"
: <<'# __END__'
'''
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from trainer.cli import main

sys.exit(main(["train", *sys.argv[1:]]))
# __END__
