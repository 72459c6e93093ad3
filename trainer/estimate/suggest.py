"""Nearest settings that fit, each found by estimating it."""

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError
from trainer.estimate.estimate import Estimate, Estimator
from trainer.recipe import Recipe
from trainer.run.resources import find_deepspeed_config

MOST_RANKS = 64  # times those that were asked for


@dataclass(frozen=True)
class Change:
    """A recipe that differs in some values, on a number of ranks. settings: as written on the command line."""

    recipe: Recipe
    world_size: int
    settings: tuple[str, ...]

    def set(self, section: str, key: str, value: object) -> "Change":
        old = getattr(self.recipe, section)
        recipe = self.recipe.model_copy(update={section: old.model_copy(update={key: value})})
        told = str(value).lower() if isinstance(value, bool) else value
        return Change(recipe, self.world_size, (*self.settings, f"{section}.{key}={told}"))

    def on(self, world_size: int) -> "Change":
        return Change(self.recipe, world_size, (*self.settings, f"--world-size {world_size}"))


def suggestions(
    estimator: Estimator, given: Estimate, device: int | None, host: int | None
) -> list[tuple[Change, Estimate]]:
    """Of each kind of change the smallest that fits alone; where none does, the first combination that fits."""
    start = Change(given.recipe, given.world_size, ())

    def first_that_fits(changes: Iterator[Change]) -> list[tuple[Change, Estimate]]:
        for change in changes:
            try:
                found = estimator.estimate(change.recipe, change.world_size)
            except UserError:  # a number of ranks, say, that does not divide the global batch
                continue
            if found.fits(device, host):
                return [(change, found)]
        return []

    kinds = (_checkpointed, _smaller, _offloaded, _more_ranks)
    alone = [found for kind in kinds for found in first_that_fits(kind(start))]
    return alone or first_that_fits(_combined(start))


def _checkpointed(start: Change) -> Iterator[Change]:
    if not start.recipe.train.activation_checkpointing:
        yield start.set("train", "activation_checkpointing", True)


def _smaller(start: Change) -> Iterator[Change]:
    """Micro-batches that divide the given one, so that any number of ranks that went still goes."""
    micro = start.recipe.train.micro_batch_size
    for size in range(micro - 1, 0, -1):
        if micro % size == 0:
            yield start.set("train", "micro_batch_size", size)


def _offloaded(start: Change) -> Iterator[Change]:
    """DeepSpeed configurations beside the given one: sharded, then offloaded."""
    given = start.recipe.deepspeed.config
    ending = ".json" if given.suffix else ""  # else a name in ds_configs
    for name in ("zero3", "zero3_offload"):
        value = given.with_name(name + ending)
        if value != given and _is_there(value):
            yield start.set("deepspeed", "config", value)


def _is_there(config: Path) -> bool:
    try:
        find_deepspeed_config(config)
    except UserError:
        return False
    return True


def _more_ranks(start: Change) -> Iterator[Change]:
    world = start.world_size
    while (world := 2 * world) <= MOST_RANKS * start.world_size:
        yield start.on(world)


def _combined(start: Change) -> Iterator[Change]:
    """From what costs least to what costs most: recompute, cut the micro-batch, offload, take more ranks."""
    slower = next(_checkpointed(start), start)
    for change in _smaller(slower):
        yield change
        slower = change
    places = [slower, *_offloaded(slower)]
    yield from places[1:]
    for place in places:
        yield from _more_ranks(place)
