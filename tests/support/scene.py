"""What ranks and the single-process reference share: a tiny base, rows, recipes. Nothing of it computes a result."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from data_prep.encode import IGNORED
from data_prep.reader import PreparedSet
from tests.support.tiny_models import FAMILIES, tiny_llama, tiny_model
from trainer.recipe import Recipe

TASKS = ["first", "second", "third"]
STEPS = 5
WORLDS = (2, 4)


def make_base(folder: Path) -> Path:
    """Tied Llama whose packed tensors do not all divide by blocks or ranks, in several files; families beside it."""
    sizes = {"hidden_size": 60, "intermediate_size": 101, "vocab_size": 300, "num_hidden_layers": 3}
    base = tiny_llama(folder, tie=True, max_shard_size="60KB", **sizes)
    for family in FAMILIES:
        tiny_model(families(base) / family, family, tie=family in ("llama", "gemma2"), max_shard_size="100KB")
    return base


def families(base: Path) -> Path:
    """Where `make_base` puts a tiny model of each family, in a folder of its name."""
    return base.parent / "families"


def recipe(base: Path, stage: int = 3, **changes: Any) -> Recipe:
    """A recipe on the tiny base; `changes` are dotted keys with __ for the dot."""
    values: dict[str, Any] = {
        "run": {"name": "test", "seed": 3},
        "base": {"model": str(base), "quantization": "nf4", "dtype": "fp32"},
        "adapter": {"num_experts": 4, "expert_rank": 4, "alpha": 8, "balance_loss_weight": 0.3},
        "data": {
            "prepared_dir": "unused",
            "seq_len": 64,
            "sources": [{"type": "files", "task": task, "path": "unused"} for task in TASKS],
        },
        "train": {
            "steps": STEPS,
            "global_batch_size": 4,
            "micro_batch_size": 1,
            "learning_rate": 2e-4,
            "lr_scheduler": "constant",
            "weight_decay": 0.01,
            "max_grad_norm": 0.5,
        },
        "deepspeed": {"config": f"ds_configs/zero{stage}.json" if stage else "ds_configs/single.json"},
    }
    for key, value in changes.items():
        section, name = key.split("__")
        values.setdefault(section, {})[name] = value
    return Recipe.model_validate(values)


def rows(count: int, seed: int, unlabelled: tuple[int, ...] = ()) -> list[dict[str, np.ndarray]]:
    """Packed rows of unequal length, of two documents each, with unequal label counts; some without any label."""
    made = []
    for index in range(count):
        random = np.random.default_rng([seed, index])
        lengths = random.integers(5, 20, size=2)
        ids = random.integers(3, 300, size=lengths.sum())
        labels = np.where(random.random(lengths.sum()) < random.uniform(0.2, 0.9), ids, IGNORED)
        labels[-1] = ids[-1]
        positions = np.concatenate([np.arange(n) for n in lengths])
        labels[(positions == 0) | (index in unlabelled)] = IGNORED
        tasks = np.repeat(random.integers(0, len(TASKS), size=2), lengths)
        made.append({"input_ids": ids, "labels": labels, "position_ids": positions, "task_ids": tasks})
    return made


def training_rows(recipe: Recipe) -> list[dict[str, np.ndarray]]:
    """Three batches; in one micro-batch of some rank nothing is labelled."""
    return rows(3 * recipe.train.global_batch_size, seed=5, unlabelled=(2,))


def prompt() -> torch.Tensor:
    return torch.arange(3, 15).view(2, 6)


def prepared(train: list, held_out: list) -> PreparedSet:
    return PreparedSet(Path("unused"), {"tasks": TASKS}, train, held_out, [])


@torch.no_grad()
def wake_experts(model: torch.nn.Module) -> None:
    """B ~ N(0, 0.02), so that every parameter has a gradient from the first step; alike in every process."""
    generator = torch.Generator().manual_seed(11)
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(".experts"):
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.02)
