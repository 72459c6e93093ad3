"""A user's folder in which real commands run: a tiny base, two tasks and a recipe; and waiting for what they train."""

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

REPOSITORY = Path(__file__).parent.parent.parent
SCRIPT = str(REPOSITORY / "launch" / "train.sh")
ZERO3 = f"deepspeed.config={REPOSITORY / 'ds_configs' / 'zero3.json'}"


@dataclass(frozen=True)
class Workplace:
    """A folder with a tiny base, two tasks and a recipe, as a user would have them."""

    folder: Path
    recipe: Path

    def environment(self, **more: str) -> dict[str, str]:
        """For a command of one thread, with this environment's programs first on the PATH."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return {**os.environ, "PATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **more}

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess:
        """Runs a command in the folder."""
        env = self.environment()
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=600, **options)

    def teamlora(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.run("teamlora", *arguments)

    def records(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def make_workplace(folder: Path) -> Workplace:
    from tests.support.tiny_models import tiny_llama  # here, since they take seconds to import
    from tests.support.tiny_tokenizer import tiny_tokenizer

    tiny_llama(folder / "base", tie=True)
    tiny_tokenizer().save_pretrained(folder / "base")
    for task, suffix in (("upper", str.upper), ("twice", lambda word: f"{word} {word}")):
        lines = [{"instruction": f"{task} {word}", "output": suffix(word)} for word in (f"word{i}" for i in range(60))]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": {"name": "first", "seed": 1},
        "base": {"model": "base", "dtype": "fp32"},
        "adapter": {"num_experts": 2, "expert_rank": 4, "alpha": 8, "balance_loss_weight": 0.01},
        "data": {
            "prepared_dir": "prepared",
            "seq_len": 96,
            "held_out": 5,
            "sources": [{"type": "files", "task": task, "path": f"{task}.jsonl"} for task in ("upper", "twice")],
        },
        "train": {"steps": 4, "global_batch_size": 4, "learning_rate": 1e-3, "warmup_ratio": 0.25, "eval_every": 2},
        "deepspeed": {"config": str(REPOSITORY / "ds_configs" / "single.json")},
        "report": {"router_every": 1},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    return Workplace(folder, folder / "recipe.yaml")


def wait_for_steps(metrics: Path, count: int) -> None:
    ending = time.monotonic() + 900
    while not (metrics.is_file() and len(metrics.read_text().splitlines()) >= count):
        assert time.monotonic() < ending, f"{metrics} never came to {count} steps"
        time.sleep(0.1)


def ranks_of(run: str) -> dict[int, int]:
    """{rank: process} of the training processes of a run."""
    found = {}
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            variables = dict(line.partition(b"=")[::2] for line in (folder / "environ").read_bytes().split(b"\0"))
        except OSError:  # it has ended
            continue
        if f"run.name={run}".encode() in words and b"RANK" in variables:
            found[int(variables[b"RANK"])] = int(folder.name)
    return found
