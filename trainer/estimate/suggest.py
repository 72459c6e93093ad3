"""Suggests the nearest settings that fit, and those that are faster, each of them estimated."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError
from trainer.estimate.estimate import Estimate, Estimator
from trainer.estimate.step_time import Hardware
from trainer.recipe import Recipe
from trainer.run.resources import find_deepspeed_config

MOST_RANKS = 64  # times the number that was asked for
WORTH_IT = 1.05  # times as fast


@dataclass(frozen=True)
class Change:
    """A recipe with some values changed, and a number of ranks. settings: the changes, as on the command line."""

    recipe: Recipe
    world_size: int
    settings: tuple[str, ...]

    def set(self, section: str, key: str, value: object) -> "Change":
        old = getattr(self.recipe, section)
        recipe = self.recipe.model_copy(update={section: old.model_copy(update={key: value})})
        text = str(value).lower() if isinstance(value, bool) else value
        others = (setting for setting in self.settings if not setting.startswith(f"{section}.{key}="))
        return Change(recipe, self.world_size, (*others, f"{section}.{key}={text}"))

    def on(self, world_size: int) -> "Change":
        return Change(self.recipe, world_size, (*self.settings, f"--world-size {world_size}"))


@dataclass(frozen=True)
class Suggestion:
    """A change that fits, and its estimate."""

    change: Change
    estimate: Estimate

    @property
    def settings(self) -> str:
        return " ".join(self.change.settings)


def suggest(estimator: Estimator, given: Estimate, device: int | None, host: int | None) -> list[Suggestion]:
    """Finds, for each kind of change, the smallest that fits alone; if none does, the first combination that fits.

    device, host: bytes per rank; None is no limit.
    """
    start = Change(given.recipe, given.world_size, ())

    def first_that_fits(changes: Iterator[Change]) -> list[Suggestion]:
        for change in changes:
            estimate = _estimate(estimator, change)
            if estimate is not None and estimate.fits(device, host):
                return [Suggestion(change, estimate)]
        return []

    kinds = (_checkpointing, _smaller_micro_batches, _other_deepspeed_configs, _more_ranks)
    alone = [suggestion for kind in kinds for suggestion in first_that_fits(kind(start))]
    return alone or first_that_fits(_combinations(start))


def suggest_faster(
    estimator: Estimator, given: Estimate, hardware: Hardware, device: int | None, host: int | None
) -> list[Suggestion]:
    """Finds, for each kind of change, the one that makes a step shortest, and before these, several together.

    Only what fits, and what WORTH_IT asks for: of each change alone, and of each one added.
    """

    def seconds(suggestion: Suggestion) -> float:
        return suggestion.estimate.step_time(hardware).step

    def best(changes: Iterable[Change], limit: float) -> list[Suggestion]:
        """The fastest of them, if it is faster than `limit`, in seconds, by enough."""
        tried = [Suggestion(change, each) for change in changes if (each := _estimate(estimator, change)) is not None]
        faster = [s for s in tried if s.estimate.fits(device, host) and WORTH_IT * seconds(s) < limit]
        return sorted(faster, key=seconds)[:1]

    start, now = Change(given.recipe, given.world_size, ()), given.step_time(hardware).step
    kinds = (_groups_of_the_base, _groups_of_the_adapter, _larger_micro_batches)
    alone = sorted([found for kind in kinds for found in best(kind(start), now)], key=seconds)
    together = alone[0] if alone else None
    for kind in kinds:
        if together is not None:
            together = next(iter(best(kind(together.change), seconds(together))), together)
    return alone if together is None or together in alone else [together, *alone]


def _groups_of_the_base(start: Change) -> Iterator[Change]:
    for group in ("node", 1):
        yield start.set("base", "shard_group", group)


def _groups_of_the_adapter(start: Change) -> Iterator[Change]:
    for group in ("node", 1):
        yield start.set("adapter", "shard_group", group)


def _larger_micro_batches(start: Change) -> Iterator[Change]:
    size, per_rank = start.recipe.train.micro_batch_size, start.recipe.train.global_batch_size // start.world_size
    while (size := 2 * size) <= per_rank:
        yield start.set("train", "micro_batch_size", size)


def _estimate(estimator: Estimator, change: Change) -> Estimate | None:
    """None where a run would be refused: for example, a number of ranks that does not divide the global batch."""
    try:
        return estimator.estimate(change.recipe, change.world_size)
    except UserError:
        return None


def _checkpointing(start: Change) -> Iterator[Change]:
    given = start.recipe.train.activation_checkpointing
    if not given:
        yield start.set("train", "activation_checkpointing", True)
    if given != "offload":
        yield start.set("train", "activation_checkpointing", "offload")


def _smaller_micro_batches(start: Change) -> Iterator[Change]:
    """Only divisors of the given size, so that every number of ranks that was valid remains valid."""
    micro = start.recipe.train.micro_batch_size
    for size in range(micro - 1, 0, -1):
        if micro % size == 0:
            yield start.set("train", "micro_batch_size", size)


def _other_deepspeed_configs(start: Change) -> Iterator[Change]:
    """The files beside the given one that shard, then those that also offload."""
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


def _combinations(start: Change) -> Iterator[Change]:
    """From the cheapest to the most expensive: recompute, smaller micro-batch, offload, more ranks."""
    slower = start if start.recipe.train.activation_checkpointing else next(_checkpointing(start))
    for change in _smaller_micro_batches(slower):
        yield change
        slower = change
    variants = [slower, *_other_deepspeed_configs(slower)]
    yield from variants[1:]
    for variant in variants:
        yield from _more_ranks(variant)
