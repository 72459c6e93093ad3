import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from tests.tiny import tiny_tokenizer
from tests.tiny_models import tiny_llama
from trainer.run.stop_signal import ASKING

REPOSITORY = Path(__file__).parent.parent.parent


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
        return subprocess.run(command, cwd=self.folder, env=env, capture_output=True, text=True, timeout=300, **options)

    def teamlora(self, *arguments: str) -> subprocess.CompletedProcess:
        return self.run("teamlora", *arguments)

    def records(self, run: str) -> list[dict[str, Any]]:
        return [json.loads(line) for line in (self.folder / "runs" / run / "metrics.jsonl").read_text().splitlines()]


def make_workplace(folder: Path) -> Workplace:
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


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    """A workplace whose data are prepared."""
    place = make_workplace(tmp_path_factory.mktemp("workplace"))
    done = place.teamlora("prepare", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The train command, called in this process, leaves handlers of its own."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def edited(workplace) -> Callable[..., str]:
    """Writes the recipe with dotted keys changed (None removes one) and returns its name."""

    def edit(**changes: Any) -> str:
        values = yaml.safe_load(workplace.recipe.read_text())
        for dotted, value in changes.items():
            section, name = dotted.split("__")
            values[section][name] = value
        (workplace.folder / "edited.yaml").write_text(yaml.safe_dump(values))
        return "edited.yaml"

    return edit
