"""The recipes under which ranks are compared with one process, each under a name: `pytest -k NAME` runs it alone."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.support import scene
from trainer.recipe import Recipe

OFFLOAD = "ds_configs/zero3_offload.json"


@dataclass(frozen=True)
class ParityCase:
    """A few steps of training. changes: of the recipe, dotted keys with __ for the dot. worlds: numbers of ranks.

    family: of the base; None: the tied Llama that all share.
    """

    name: str
    micro_batch_size: int
    accumulation: int
    changes: dict[str, Any] = field(default_factory=dict)
    worlds: tuple[int, ...] = scene.WORLDS
    family: str | None = None

    def recipe(self, base: Path, world: int) -> Recipe:
        return scene.recipe(
            base if self.family is None else scene.families(base) / self.family,
            train__global_batch_size=world * self.micro_batch_size * self.accumulation,
            train__micro_batch_size=self.micro_batch_size,
            **self.changes,
        )


def placed(size: int, dispatch: str, **changes: Any) -> dict[str, Any]:
    return {"experts__parallel_size": size, "experts__dispatch": dispatch, "train__steps": 10, **changes}


def placed_case(size: int, dispatch: str, accumulation: int, checkpointed: bool) -> ParityCase:
    """A placement of `size` ranks. On 4 ranks, where a case takes half a minute, with both or neither of the two."""
    both_or_neither = (accumulation > 1) == checkpointed
    return ParityCase(
        f"{dispatch}_{size}{'_accumulated' * (accumulation > 1)}{'_checkpointed' * checkpointed}",
        4 - accumulation,
        accumulation,
        placed(size, dispatch, train__activation_checkpointing=checkpointed),
        tuple(world for world in scene.WORLDS if world >= size and (world == 2 or both_or_neither)),
    )


CHECKPOINTING = {"train__activation_checkpointing": True}
ON_HOST = {"train__activation_checkpointing": "offload"}
SHORT = {"train__steps": 3}
PARITY = [
    ParityCase("plain", 3, 1),
    ParityCase("accumulated", 1, 3),
    ParityCase("checkpointed", 3, 1, CHECKPOINTING),
    ParityCase("accumulated_checkpointed", 1, 3, CHECKPOINTING),
    ParityCase("offloaded", 1, 3, {"deepspeed__config": OFFLOAD}),
    ParityCase("zero2", 1, 3, {"deepspeed__config": "ds_configs/zero2.json"}),
    # chunks of labelled tokens, whose number differs between ranks
    ParityCase("loss_chunks", 3, 1, {"train__loss_chunk": 4}),
    ParityCase("loss_chunks_accumulated", 1, 3, {"train__loss_chunk": 4, **CHECKPOINTING}, worlds=(2,)),
    ParityCase("loss_chunks_untied", 1, 3, {"train__loss_chunk": 4}, worlds=(2,), family="qwen3"),
    ParityCase("loss_chunks_offloaded", 1, 2, {"train__loss_chunk": 4, "deepspeed__config": OFFLOAD}, worlds=(2,)),
    ParityCase("moelora", 1, 2, {"adapter__method": "moelora"}),
    ParityCase("hydralora", 1, 2, {"adapter__method": "hydralora"}),
    # the base in groups of ranks: whole on each, and on 4 ranks two copies; fewer cases where each takes long
    *(
        ParityCase(f"base_in_groups_of_{group}", 1, 3, {"base__shard_group": group, **CHECKPOINTING}, worlds)
        for group, worlds in ((1, (2, 4)), (2, (4,)))
    ),
    ParityCase("base_whole_offloaded", 1, 3, {"base__shard_group": 1, "deepspeed__config": OFFLOAD}, (2,)),
    ParityCase("base_in_groups_offloaded", 1, 3, {"base__shard_group": 2, "deepspeed__config": OFFLOAD}, (4,)),
    ParityCase("base_whole_weights", 1, 3, placed(2, "weights", base__shard_group=1, **SHORT, **CHECKPOINTING), (2,)),
    ParityCase("base_in_groups_weights", 1, 3, placed(2, "weights", base__shard_group=2, **SHORT), (4,)),
    ParityCase("base_in_groups_tokens", 1, 3, placed(4, "tokens", base__shard_group=2, **SHORT), (4,)),
    # copies of what learns: whole on each rank, and on 4 ranks two, each of them divided
    ParityCase("adapter_whole", 3, 1, {"adapter__shard_group": 1}, (2,)),
    ParityCase("adapter_whole_accumulated", 1, 3, {"adapter__shard_group": 1, "base__shard_group": 1}, (2,)),
    ParityCase("adapter_whole_offloaded", 1, 3, {"adapter__shard_group": 1, "deepspeed__config": OFFLOAD}, (2,)),
    ParityCase("adapter_in_groups", 1, 3, {"adapter__shard_group": 2, "base__shard_group": 2, **CHECKPOINTING}, (4,)),
    ParityCase("adapter_in_groups_weights", 1, 3, placed(2, "weights", adapter__shard_group=2, **SHORT), (4,)),
    ParityCase("adapter_in_groups_tokens", 1, 1, placed(2, "tokens", adapter__shard_group=2, **SHORT), (4,)),
    *(
        placed_case(2, dispatch, accumulation, checkpointed)
        for dispatch in ("weights", "tokens")
        for accumulation in (1, 3)
        for checkpointed in (False, True)
    ),
    *(
        placed_case(4, dispatch, accumulation, accumulation > 1)
        for dispatch in ("weights", "tokens")
        for accumulation in (1, 3)
    ),
    # one number of ranks is enough for these; experts have replicas only where there are more ranks than a group has
    ParityCase("weights_replicated", 1, 2, placed(2, "weights", experts__replicate=True), worlds=(4,)),
    ParityCase("tokens_replicated", 1, 2, placed(2, "tokens", experts__replicate=True), worlds=(4,)),
    ParityCase("weights_offloaded", 1, 2, placed(2, "weights", deepspeed__config=OFFLOAD), worlds=(2,)),
    ParityCase("tokens_offloaded", 1, 2, placed(2, "tokens", deepspeed__config=OFFLOAD), worlds=(2,)),
    ParityCase("weights_activations_offloaded", 1, 2, placed(2, "weights", **SHORT, **ON_HOST), worlds=(2,)),
    ParityCase("tokens_activations_offloaded", 1, 2, placed(2, "tokens", **SHORT, **ON_HOST), worlds=(2,)),
    ParityCase("weights_moelora", 1, 2, placed(2, "weights", adapter__method="moelora"), worlds=(2,)),
    ParityCase("tokens_moelora", 1, 2, placed(2, "tokens", adapter__method="moelora"), worlds=(2,)),
    ParityCase("weights_hydralora", 1, 2, placed(2, "weights", adapter__method="hydralora"), worlds=(2,)),
    ParityCase("tokens_hydralora", 1, 2, placed(2, "tokens", adapter__method="hydralora"), worlds=(2,)),
    ParityCase("weights_loss_chunks", 3, 1, placed(2, "weights", train__loss_chunk=4, **SHORT), worlds=(2,)),
    ParityCase("tokens_loss_chunks", 1, 2, placed(2, "tokens", train__loss_chunk=4, **SHORT), worlds=(2,)),
    # micro-batches on both sides of where `auto` switches
    ParityCase("auto", 1, 2, placed(2, "auto"), worlds=(2,)),
]
# in bf16 nothing equals one process to 1e-5; placed ranks are compared with the same ranks without placement
BF16 = [
    ParityCase("bf16_unplaced", 2, 1, placed(1, "auto", base__dtype="bf16")),
    ParityCase("bf16_weights", 2, 1, placed(2, "weights", base__dtype="bf16")),
    ParityCase("bf16_tokens", 2, 1, placed(2, "tokens", base__dtype="bf16")),
]


def by_name(names: Sequence[str]) -> list[ParityCase]:
    """The cases of these names, in the order above."""
    return [case for case in (*PARITY, *BF16) if case.name in names]
