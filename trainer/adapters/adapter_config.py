"""Configurations of the expert-adapter methods in PEFT's form, saved as adapter_config.json."""

from dataclasses import dataclass, field
from typing import Any

from peft import PeftConfig
from peft.utils import PeftType

from trainer.recipe import AdapterConfig


def _like_recipe(name: str) -> Any:
    """A dataclass field with the default and the description of this key in the recipe's adapter section."""
    key = AdapterConfig.model_fields[name]
    metadata = {"help": key.description}
    if isinstance(key.default, list):
        return field(default_factory=key.default.copy, metadata=metadata)
    return field(default=key.default, metadata=metadata)


def _is_count(value: Any) -> bool:
    """Whether a value, perhaps from a damaged file, is a positive integer."""
    return type(value) is int and value > 0


@dataclass
class ExpertLoraConfig(PeftConfig):
    """Settings shared by TeamLoRA, MoELoRA and HydraLoRA; those that a recipe has too take its defaults.

    There are two ranks: `expert_rank` is r_B, the rank of one expert; `total_rank` is r_A = num_experts * expert_rank,
    the rank of the plain LoRA with the same cost. `target_modules` may also be a regular expression over whole names,
    or "all-linear". `balance_loss_weight` takes effect only where a training loop drives `RouterStats`.

    Raises:
        ValueError: a number is out of range, or a layer selector would be ignored.
    """

    num_experts: int = _like_recipe("num_experts")
    expert_rank: int = _like_recipe("expert_rank")
    alpha: float = _like_recipe("alpha")
    dropout: float = _like_recipe("dropout")
    target_modules: list[str] | str | None = _like_recipe("target_modules")  # noqa: RUF009 (makes a field)
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "names, or a regular expression, to leave out of target_modules"}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "indices of the decoder layers to adapt; None: all"}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "name of the list of layers that layers_to_transform indexes"}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "further modules to train whole and save with the adapter"}
    )
    balance_loss_weight: float = _like_recipe("balance_loss_weight")
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: B starts at 0, so the model starts unchanged; False: B ~ N(0, 0.02), for tests"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "expert_rank"):
            if not _is_count(getattr(self, name)):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive integer")
        for name in ("alpha", "dropout", "balance_loss_weight"):
            if not isinstance(getattr(self, name), int | float) or isinstance(getattr(self, name), bool):
                raise ValueError(f"{name} is {getattr(self, name)}, expected a number")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"dropout is {self.dropout}, expected a number from 0 to below 1")
        if self.layers_to_transform is not None and isinstance(self.target_modules, str):
            raise ValueError("layers_to_transform has no effect when target_modules is a regular expression")
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern has no effect without layers_to_transform")

    @property
    def total_rank(self) -> int:
        """r_A = k * r_B."""
        return self.num_experts * self.expert_rank


@dataclass
class TeamLoraConfig(ExpertLoraConfig):
    """TeamLoRA (arXiv 2408.09856): one shared A, k experts B_i, a router and the interaction matrix M."""

    renormalize: bool = _like_recipe("renormalize")
    num_router_outputs: int | None = field(
        default=None,
        metadata={"help": "entries of phi; None: one per expert; set where experts were added or removed later"},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not isinstance(self.renormalize, bool):
            raise ValueError(f"renormalize is {self.renormalize}, expected true or false")
        if self.num_router_outputs is not None and not _is_count(self.num_router_outputs):
            raise ValueError(f"num_router_outputs is {self.num_router_outputs}, expected a positive integer")
        self.peft_type = PeftType("TEAMLORA")


@dataclass
class MoeLoraConfig(ExpertLoraConfig):
    """MoELoRA: k pairs (A_i, B_i) of rank r_B under a softmax router."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("MOELORA")


@dataclass
class HydraLoraConfig(ExpertLoraConfig):
    """HydraLoRA: one A of rank `expert_rank`, shared whole by k heads B_i of that rank, softmax router."""

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType("HYDRALORA")
