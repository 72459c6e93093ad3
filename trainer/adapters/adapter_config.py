"""Configurations of the expert-adapter methods, in PEFT's form (saved as adapter_config.json)."""

from dataclasses import dataclass, field

from peft import PeftConfig
from peft.utils import PeftType

FEED_FORWARD_MODULES = ("gate_proj", "up_proj", "down_proj")


@dataclass
class ExpertLoraConfig(PeftConfig):
    """What TeamLoRA, MoELoRA and HydraLoRA have in common.

    Two ranks are told apart everywhere: `expert_rank` is r_B, the rank of one expert; `total_rank` is
    r_A = num_experts * expert_rank, that of the plain LoRA with the same cost.

    Raises:
        ValueError: a number out of range, or layer selectors that would be ignored.
    """

    num_experts: int = field(default=4, metadata={"help": "k, the number of experts of each adapted linear."})
    expert_rank: int = field(default=8, metadata={"help": "r_B, the rank of one expert."})
    alpha: float = field(default=16.0, metadata={"help": "The update is scaled by alpha / r_B."})
    dropout: float = field(
        default=0.0, metadata={"help": "Dropout on the adapter's input while training, as in PEFT's LoRA."}
    )
    target_modules: list[str] | str | None = field(
        default_factory=lambda: list(FEED_FORWARD_MODULES),
        metadata={"help": "Name suffixes (a list), a regular expression over whole names, or 'all-linear'."},
    )
    exclude_modules: list[str] | str | None = field(
        default=None, metadata={"help": "Names or a regular expression left out of target_modules."}
    )
    layers_to_transform: list[int] | int | None = field(
        default=None, metadata={"help": "Indices of the decoder layers to adapt; all of them by default."}
    )
    layers_pattern: list[str] | str | None = field(
        default=None, metadata={"help": "Name of the list of layers that layers_to_transform counts in."}
    )
    modules_to_save: list[str] | None = field(
        default=None, metadata={"help": "Further modules that are trained whole and saved with the adapter."}
    )
    balance_loss_weight: float = field(
        default=0.0,
        metadata={"help": "Weight of the balance loss; takes effect where a loop drives `RouterStats`."},
    )
    init_weights: bool = field(
        default=True,
        metadata={"help": "True: B starts at 0, so the model starts unchanged. False: B ~ N(0, 0.02), for tests."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("num_experts", "expert_rank"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a positive integer")
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

    renormalize: bool = field(
        default=False,
        metadata={"help": "Divide the weights after competition by their (guarded) sum. The paper does not."},
    )

    num_router_outputs: int | None = field(
        default=None,
        metadata={"help": "What phi has entries for; one an expert, but where experts were added or dropped later."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
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
