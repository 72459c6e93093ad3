"""Makes the files of this folder anew, by the commands alone: `python -m tests.golden.make FOLDER`.

The files that are kept were made by commit 0a15e39 and must never be made again by later code: they show that what
users have on their disks still loads, evaluates and resumes (tests/test_golden.py).
"""

import json
import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml

METHODS = ("teamlora", "moelora", "hydralora", "lora")
SAVED_AT, STEPS = 2, 4
ZERO3 = {
    "train_batch_size": "auto",
    "train_micro_batch_size_per_gpu": "auto",
    "gradient_accumulation_steps": "auto",
    "gradient_clipping": "auto",
    "bf16": {"enabled": "auto"},
    "zero_allow_untested_optimizer": True,
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def recipe() -> dict[str, Any]:
    """On the tiny base and two tasks of this folder; paths are relative to it."""
    return {
        "run": {"name": "teamlora", "seed": 1},
        "base": {"model": "base", "dtype": "fp32"},
        "adapter": {"num_experts": 2, "expert_rank": 4, "alpha": 8, "balance_loss_weight": 0.01},
        "data": {
            "prepared_dir": "prepared",
            "seq_len": 96,
            "held_out": 4,
            "sources": [{"type": "files", "task": task, "path": f"{task}.jsonl"} for task in ("upper", "twice")],
        },
        "train": {"steps": STEPS, "global_batch_size": 4, "learning_rate": 1e-2, "warmup_ratio": 0.25},
        "deepspeed": {"config": "zero3.json"},
        "checkpoint": {"save_every": SAVED_AT, "keep_last": 9},
        "report": {"router_every": 1, "tensorboard": False},
    }


def processor() -> str:
    """What decides the last bits of sums: the same text, the same bits."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), platform.machine())
    return f"{name}, {torch.backends.cpu.get_cpu_capability()}"


def teamlora(folder: Path, *arguments: str) -> str:
    """What a command printed, run in the folder by one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "trainer", *arguments]
    return subprocess.run(command, cwd=folder, env=environment, check=True, capture_output=True, text=True).stdout


def scores(folder: Path, run: str) -> dict[str, Any]:
    """By task the run's loss and scores, and its answers."""
    found = json.loads(teamlora(folder, "evaluate", f"runs/{run}", "--against", "none", "--json"))
    return {
        "tasks": {task["task"]: task["models"]["adapter"] for task in found["tasks"]},
        "answers": [item["models"]["adapter"]["given"] for item in found["items"]],
    }


def main(folder: Path) -> None:
    from tests.support.tiny_models import tiny_llama
    from tests.support.tiny_tokenizer import tiny_tokenizer

    sizes = {"hidden_size": 32, "intermediate_size": 64, "head_dim": 8}
    tiny_llama(folder / "base", tie=True, **sizes)
    tiny_tokenizer().save_pretrained(folder / "base")
    for task, change in (("upper", str.upper), ("twice", lambda word: f"{word} {word}")):
        lines = [{"instruction": f"{task} {word}", "output": change(word)} for word in (f"word{i}" for i in range(40))]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe(), sort_keys=False))
    (folder / "zero3.json").write_text(json.dumps(ZERO3, indent=2) + "\n")
    teamlora(folder, "prepare", "recipe.yaml")
    for picture in (folder / "prepared").glob("*.png"):
        picture.unlink()
    expected: dict[str, Any] = {"processor": processor()}
    for method in METHODS:
        changes = ["adapter.num_experts=1", "adapter.balance_loss_weight=0"] if method == "lora" else []
        teamlora(folder, "train", "recipe.yaml", f"run.name={method}", f"adapter.method={method}", *changes)
        expected[method] = scores(folder, method)
        (folder / "runs" / method / "evaluation.json").unlink()
        if method != "teamlora":
            shutil.rmtree(folder / "runs" / method / "checkpoints")
    checkpoints = folder / "runs" / "teamlora" / "checkpoints"
    shutil.rmtree(checkpoints / f"step-{STEPS:06}")
    (checkpoints / "latest").write_text(f"step-{SAVED_AT:06}\n")
    (checkpoints / "best").unlink(missing_ok=True)
    teamlora(folder, "export", "runs/teamlora", "--to", "merged", "--output", "export-merged", "--rows", "8")
    (folder / "expected.json").write_text(json.dumps(expected, indent=1) + "\n")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
