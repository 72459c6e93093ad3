"""What `python -m benchmarks.nodes` trains, and what a rank reports of a step."""

from dataclasses import dataclass, field

from benchmarks.step.setting import TARGETS
from trainer.recipe import Recipe

# changes of the recipe by the name of a setting
SETTINGS: dict[str, dict[str, dict[str, str | int]]] = {
    "zero3": {},
    "base": {"base": {"shard_group": 1}},
    "base and adapter": {"base": {"shard_group": 1}, "adapter": {"shard_group": "node"}},
}


@dataclass(frozen=True)
class Plan:
    """nodes, ranks_per_node: of the run. schedule: for each measured step the name in SETTINGS, and the rate of the
    link, None for unlimited."""

    base: str
    rows: str
    nodes: int
    schedule: list[tuple[str, str | None]]
    ranks_per_node: int = 2
    accumulation: int = 4
    seq_len: int = 64

    @property
    def settings(self) -> list[str]:
        """All that are measured, each once."""
        return list(dict.fromkeys(name for name, _ in self.schedule))

    @property
    def world(self) -> int:
        return self.nodes * self.ranks_per_node


@dataclass(frozen=True)
class Measurement:
    """One step of one rank. tokens: of all ranks. sent: bytes that left the rank's node."""

    rank: int
    setting: str
    rate: str | None
    tokens: int
    seconds: float
    sent: int
    loss: float = field(default=float("nan"))


def recipe_of(plan: Plan, setting: str) -> Recipe:
    changes = SETTINGS[setting]
    return Recipe.model_validate(
        {
            "run": {"name": "benchmark"},
            "base": {"model": plan.base, "quantization": "nf4", "dtype": "bf16", **changes.get("base", {})},
            "adapter": {"num_experts": 4, "expert_rank": 8, "target_modules": TARGETS, **changes.get("adapter", {})},
            "data": {
                "prepared_dir": "unused",
                "seq_len": plan.seq_len,
                "sources": [{"type": "files", "task": "text", "path": "unused"}],
            },
            "train": {
                "steps": 1000,
                "global_batch_size": plan.world * plan.accumulation,
                "micro_batch_size": 1,
                "learning_rate": 2e-4,
                "lr_scheduler": "constant",
            },
            "deepspeed": {"config": "zero3"},
        }
    )
