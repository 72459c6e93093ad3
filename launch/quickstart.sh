#!/usr/bin/env bash
# From an empty clone to a result: installs, prepares a real 135M model and real tasks, fine-tunes, and shows what
# was learned. About ten minutes on two CPU cores. Safe to run again: finished parts are kept.
set -euo pipefail
cd "$(dirname "$0")/.."
started=$SECONDS
recipe=launch/recipes/quickstart.yaml
say() { printf '\n== %s (%d s)\n' "$1" "$((SECONDS - started))"; }

say "1. install"
bash launch/install.sh sample
export PATH="$PWD/.venv/bin:$PATH" HF_HUB_OFFLINE=1 OMP_NUM_THREADS=1

say "2. the base model: SmolLM2-135M-Instruct"
python -m trainer.base.sample bases/smollm2-135m-instruct

say "3. the tasks: questions to packed, labeled rows"
teamlora prepare "$recipe"

# Two ranks: on two GPUs, or on the CPU where there is none. One on a single GPU.
ranks="$(python -c 'import torch; print(min(torch.cuda.device_count() or 2, 2))')"
# bf16, or fp32 on a CPU that only emulates bf16, which takes twenty times as long.
dtype="$(python -c 'import torch as t; from trainer.training.run_plan import cpu_has_fast_bf16 as fast
print("bf16" if t.cuda.is_available() or fast() else "fp32")')"
say "4. train: 4-bit base sharded by ZeRO-3, ranks: $ranks, base.dtype: $dtype"
bash launch/train.sh num_gpus="$ranks" "$recipe" base.dtype="$dtype"

say "5. what was learned"
OMP_NUM_THREADS=2 teamlora evaluate runs/quickstart --batch-size 100

say "done"
echo "watch it:  .venv/bin/tensorboard --logdir runs/quickstart"
echo "ask it:    .venv/bin/teamlora generate runs/quickstart --prompt 'What is 3 + 4?'"
