"""An 8B configuration cut to eight layers, with random weights and a task of random words: to train by the command."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from tests.support.random_llama import LLAMA_8B, build_model
from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.workplace import Workplace

# The vocabulary, too, is cut: the tiny tokenizer hardly fills it.
SIZES = {**LLAMA_8B, "num_hidden_layers": 8, "vocab_size": 32_000}
STEPS, SEQ_LEN = 20, 2048


@dataclass(frozen=True)
class EightLayers:
    """Where its runs happen."""

    workplace: Workplace

    def train(self, name: str, *overrides: str) -> list[dict[str, Any]]:
        """The records of metrics.jsonl of a run of that name."""
        done = self.workplace.teamlora("train", "recipe.yaml", f"run.name={name}", *overrides)
        assert done.returncode == 0, done.stdout + done.stderr
        return self.workplace.records(name)

    def estimate(self, *overrides: str) -> dict[str, Any]:
        options = ["recipe.yaml", *overrides, "--gpu-memory", "900GiB", "--json"]
        return json.loads(self.workplace.teamlora("estimate", *options).stdout)


def make_eight_layers(folder: Path) -> EightLayers:
    build_model(folder / "base", SIZES)
    tiny_tokenizer().save_pretrained(folder / "base")
    words = random.Random(0)
    lines = [
        {"instruction": "say", "output": " ".join(f"{words.randrange(10**6)}" for _ in range(40))} for _ in range(4000)
    ]
    (folder / "words.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = {
        "run": {"name": "none", "seed": 1},
        "base": {"model": "base"},
        "adapter": {"num_experts": 4, "expert_rank": 16},
        "data": {
            "prepared_dir": "prepared",
            "seq_len": SEQ_LEN,
            "held_out": 5,
            "sources": [{"type": "files", "task": "words", "path": "words.jsonl"}],
        },
        "train": {
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "activation_checkpointing": True,
        },
        "deepspeed": {"config": "single"},
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    workplace = Workplace(folder, folder / "recipe.yaml")
    done = workplace.teamlora("prepare", "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return EightLayers(workplace)
