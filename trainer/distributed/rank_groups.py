"""Which neighbouring ranks the recipe puts together, and whether the ranks of a launch can be grouped so.

Three settings make groups: experts.parallel_size, the owners of a layer's experts, and base.shard_group and
adapter.shard_group, the ranks that divide one copy of the base or of what learns among them. All are of ranks that
follow one another. local_ranks: LOCAL_RANK of
every rank of the launch, in order; a node begins at each 0. config, path: DeepSpeed's configuration and its file.
Imports no torch.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from data_prep.user_error import UserError
from trainer.recipe import BaseModelConfig, ExpertsConfig, Recipe


def check_expert_parallel(
    experts: ExpertsConfig, local_ranks: Sequence[int], config: dict[str, Any], path: Path
) -> None:
    """Raises UserError where these ranks cannot hold the placement of experts."""
    size = experts.parallel_size
    stage = config["zero_optimization"].get("stage")
    if size > 1 and stage != 3:
        raise UserError(
            f"experts.parallel_size={size}: {path} has ZeRO stage {stage}, which keeps every parameter whole on every "
            "rank and has no expert groups; use ds_configs/zero3.json or set it to 1"
        )
    _check_divides("experts.parallel_size", size, len(local_ranks))
    if not experts.across_nodes and crosses_nodes(size, local_ranks):
        raise UserError(
            f"experts.parallel_size={size}: a group would span two nodes; choose a divisor of the ranks per node or "
            "set experts.across_nodes=true"
        )


@dataclass(frozen=True)
class ShardGroups:
    """Ranks that divide one copy of the base, and one of the adapter, among them; 1: it is whole on each."""

    base: int
    adapter: int


def shard_groups(recipe: Recipe, local_ranks: Sequence[int], config: dict[str, Any]) -> ShardGroups:
    """Raises UserError where these ranks cannot be grouped as the recipe says."""
    check_expert_parallel(recipe.experts, local_ranks, config, recipe.deepspeed.config)
    base = base_shard_group(recipe.base, local_ranks, config, recipe.deepspeed.config)
    adapter = _size("adapter.shard_group", recipe.adapter.shard_group, local_ranks, config, recipe.deepspeed.config)
    if adapter % recipe.experts.parallel_size:
        raise UserError(
            f"adapter.shard_group={recipe.adapter.shard_group}: the {recipe.experts.parallel_size} ranks of "
            f"experts.parallel_size do not divide a group of {adapter}; choose a multiple or another parallel_size"
        )
    return ShardGroups(base, adapter)


def base_shard_group(base: BaseModelConfig, local_ranks: Sequence[int], config: dict[str, Any], path: Path) -> int:
    """Ranks that divide one copy of the base among them; 1: the base is whole on each.

    Raises UserError where these ranks cannot be grouped so.
    """
    size = _size("base.shard_group", base.shard_group, local_ranks, config, path)
    return size if config["zero_optimization"].get("stage") == 3 else 1


def _size(
    key: str, wanted: int | Literal["world", "node"], local_ranks: Sequence[int], config: dict[str, Any], path: Path
) -> int:
    world, stage = len(local_ranks), config["zero_optimization"].get("stage")
    if stage != 3 and wanted not in ("world", 1):
        raise UserError(
            f"{key}={wanted}: {path} has ZeRO stage {stage}, which keeps base and adapter whole on every rank; use "
            "ds_configs/zero3.json or remove it"
        )
    if wanted == "world" or stage != 3:
        return world
    if wanted == "node":
        return _ranks_per_node(key, local_ranks)
    _check_divides(key, wanted, world)
    return wanted


def local_ranks_of(slots: Iterable[int]) -> list[int]:
    """LOCAL_RANK of every rank where nodes have so many ranks each."""
    return [local_rank for count in slots for local_rank in range(count)]


def crosses_nodes(size: int, local_ranks: Sequence[int]) -> bool:
    """Whether one of the groups of `size` ranks stands on more than one node."""
    groups = [list(local_ranks[start : start + size]) for start in range(0, len(local_ranks), size)]
    return any(group != list(range(group[0], group[0] + size)) for group in groups)


def _ranks_per_node(key: str, local_ranks: Sequence[int]) -> int:
    firsts = [rank for rank, local_rank in enumerate(local_ranks) if local_rank == 0]
    counts = [end - first for first, end in zip(firsts, [*firsts[1:], len(local_ranks)], strict=True)]
    if len(set(counts)) > 1:
        raise UserError(
            f"{key}=node: the nodes have {', '.join(map(str, counts[:-1]))} and {counts[-1]} ranks; give "
            f"every node as many, or set a number that divides {len(local_ranks)}"
        )
    return counts[0]


def _check_divides(key: str, size: int, world: int) -> None:
    if world % size:
        raise UserError(f"{key}={size} does not divide the {world} ranks of this run; change one")
