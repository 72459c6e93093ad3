"""An 8B configuration cut to eight layers, with random weights and a task of random words: to train by the command."""

import json
import random
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import LlamaConfig, LlamaForCausalLM

from tests.support.tiny_tokenizer import tiny_tokenizer
from tests.support.workplace import Workplace

# Llama 3's 8B, but for the layers, and for the vocabulary, which the tiny tokenizer hardly fills.
SIZES = {
    "hidden_size": 4096, "intermediate_size": 14336, "num_attention_heads": 32, "num_key_value_heads": 8,
    "num_hidden_layers": 8, "vocab_size": 32_000, "max_position_embeddings": 8192,
}  # fmt: skip
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
    """Made on the GPU, where two billion random numbers take no time."""
    with torch.device("cuda"):
        torch.manual_seed(0)
        model = LlamaForCausalLM(LlamaConfig(**SIZES, tie_word_embeddings=False, dtype=torch.bfloat16)).bfloat16()
    model.save_pretrained(folder / "base")
    del model
    torch.cuda.empty_cache()
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
