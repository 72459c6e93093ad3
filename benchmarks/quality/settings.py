"""What a cell is: a method, its settings, and all that is the same for every cell."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from trainer.adapters.layer import Experts
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe

RECIPE = Path("launch/recipes/suite.yaml")
WORK = Path("runs/quality")

STEPS, TUNING_STEPS = 128, 64
VALIDATION = 20  # the first held-out items of each task; the others are for tests
EXPERTS = 4
TOTAL_RANK = 32  # r_A
SCALE = 2  # alpha / rank, of every method

# What all cells have in common beside the recipe. The base is in bf16: a CPU would unpack NF4 in every forward.
FIXED = {
    "base.quantization": "none",
    "run.output_dir": str(WORK),
    "data.prepared_dir": "prepared/quality",
    "train.global_batch_size": 2,
    "train.micro_batch_size": 2,
    "train.epochs": None,
    "train.eval_rows": 1,
    "checkpoint.save_every": 0,
    "checkpoint.keep_best": False,
    "report.tensorboard": False,
}


def _experts(method: str, expert_rank: int | None = None) -> Callable[[int], dict[str, Any]]:
    def settings(experts: int) -> dict[str, Any]:
        rank = expert_rank or TOTAL_RANK // experts
        return {"method": method, "num_experts": experts, "expert_rank": rank, "alpha": SCALE * rank}

    return settings


def _lora(parts: int) -> Callable[[int], dict[str, Any]]:
    """A LoRA of rank r_A over `parts`."""

    def settings(_experts: int) -> dict[str, Any]:
        rank = TOTAL_RANK // parts
        plain = {"method": "lora", "num_experts": 1, "expert_rank": rank, "alpha": SCALE * rank}
        return plain | {"balance_loss_weight": 0.0}

    return settings


@dataclass(frozen=True)
class Method:
    """label: in tables. adapter: the recipe's adapter section for k experts; None: the bare base."""

    label: str
    adapter: Callable[[int], dict[str, Any]] | None


METHODS = {
    "base": Method("bare base", None),
    "lora_small": Method("LoRA, r_B", _lora(EXPERTS)),
    "lora": Method("LoRA, r_A", _lora(1)),
    "hydralora": Method("HydraLoRA, r_B", _experts("hydralora")),
    # The rank at which it has as many parameters as TeamLoRA on all linears of SmolLM2-135M (a test holds it).
    "hydralora_matched": Method("HydraLoRA, parameters as TeamLoRA", _experts("hydralora", expert_rank=13)),
    "moelora": Method("MoELoRA", _experts("moelora")),
    "teamlora": Method("TeamLoRA", _experts("teamlora")),
}
TRAINED = [name for name, method in METHODS.items() if method.adapter]


def _interaction(reach: float) -> Callable[[Experts], Any]:
    """M with 1 on the diagonal and up to +-reach elsewhere, in place of 0.1."""
    return lambda adapter: adapter.interaction.uniform_(-reach, reach).fill_diagonal_(1)


@dataclass(frozen=True)
class Trial:
    """What might tell methods apart, tried on validation items only.

    settings: of the recipe. start: what is done to an adapter's fresh values, in place.
    """

    label: str
    settings: dict[str, Any] = field(default_factory=dict)
    start: Callable[[Experts], Any] | None = None
    methods: tuple[str, ...] = ("teamlora",)


THREE = ("teamlora", "moelora", "lora")
TRIALS = {
    "seed": Trial("another seed: how much chance does", {"run.seed": 100}, methods=THREE),
    "alpha1": Trial("alpha / rank 1 in place of 2", {"adapter.alpha": TOTAL_RANK // EXPERTS}),
    "alpha4": Trial("alpha / rank 4", {"adapter.alpha": 4 * TOTAL_RANK // EXPERTS}),
    "balance0": Trial("balance loss weight 0 in place of 0.01", {"adapter.balance_loss_weight": 0.0}),
    "balance10": Trial("balance loss weight 0.1", {"adapter.balance_loss_weight": 0.1}),
    "identity": Trial("M starts at the identity", start=_interaction(0)),
    "wide": Trial("M starts off the diagonal at up to 0.5 in place of 0.1", start=_interaction(0.5)),
    "router4": Trial("router starts 4 times as large", start=lambda adapter: adapter.router.mul_(4)),
    "router4-balance0": Trial(
        "the same, and balance loss weight 0",
        {"adapter.balance_loss_weight": 0.0},
        start=lambda adapter: adapter.router.mul_(4),
    ),
    "long": Trial("256 steps in place of 64", {"train.steps": 256}, methods=THREE),
}


@dataclass(frozen=True)
class Cell:
    """One training and its scores.

    share: percent of the rows that the others see, each once: so many fewer steps. tuning: short, and scored on
    validation items; trial: a name of TRIALS, "" for what is compared.
    """

    method: str
    seed: int
    learning_rate: float
    experts: int = EXPERTS
    share: int = 100
    tuning: bool = False
    trial: str = ""

    @property
    def name(self) -> str:
        if METHODS[self.method].adapter is None:
            return self.method
        kind = f"trial-{self.trial}-" if self.trial else "tuning-" if self.tuning else ""
        return f"{kind}{self.method}-k{self.experts}-data{self.share}-lr{self.learning_rate:g}-seed{self.seed}"

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def recipe_of(cell: Cell, base: str) -> Recipe:
    adapter = METHODS[cell.method].adapter
    settings = {
        **FIXED,
        "base.model": base,
        "run.name": cell.name,
        "run.seed": cell.seed,
        "train.steps": TUNING_STEPS if cell.tuning else STEPS * cell.share // 100,
        "train.learning_rate": cell.learning_rate or 1.0,
        **{f"adapter.{key}": value for key, value in (adapter(cell.experts) if adapter else {}).items()},
        **(TRIALS[cell.trial].settings if cell.trial else {}),
    }
    return _load(settings)


def _load(settings: dict[str, Any]) -> Recipe:
    return load_recipe(RECIPE, [f"{key}={json.dumps(value)}" for key, value in settings.items()])


def recipe_hash() -> str:
    """Of what every cell shares: the recipe as it is with FIXED, and the budgets."""
    recipe = _load({**FIXED, "train.steps": STEPS}).model_dump(mode="json")
    budget = [STEPS, TUNING_STEPS, VALIDATION, TOTAL_RANK, SCALE]
    return hashlib.sha256(json.dumps([recipe, budget], sort_keys=True).encode()).hexdigest()[:16]
