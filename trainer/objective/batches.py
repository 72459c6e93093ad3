"""Which rows go to which rank at which step, as pure functions of (seed, step): no state has to be saved."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np
import torch

from data_prep.encode import IGNORED
from data_prep.user_error import UserError

NO_TASK = -1  # task id of padding

Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class BatchPlan:
    """How a global batch of rows is cut over ranks and micro-batches."""

    global_batch_size: int
    micro_batch_size: int
    world_size: int

    @property
    def gradient_accumulation_steps(self) -> int:
        return self.global_batch_size // (self.micro_batch_size * self.world_size)


def plan_batches(global_batch_size: int, micro_batch_size: int, world_size: int) -> BatchPlan:
    """Derives the accumulation. Raises UserError where the global batch cannot be cut evenly."""
    unit = micro_batch_size * world_size
    if global_batch_size % unit:
        nearest = max(unit, round(global_batch_size / unit) * unit)
        raise UserError(
            f"train.global_batch_size={global_batch_size} is not divisible by train.micro_batch_size="
            f"{micro_batch_size} x {world_size} ranks = {unit}; the nearest that is: {nearest}"
        )
    return BatchPlan(global_batch_size, micro_batch_size, world_size)


def steps_in(epochs: float, num_rows: int, global_batch_size: int) -> int:
    """Optimizer steps that see every row `epochs` times; the last global batch may reach into the next epoch."""
    return math.ceil(Fraction(str(epochs)) * num_rows / global_batch_size)  # exact: 1.1 x 50 is 55, not a little more


def rows_of_step(seed: int, step: int, num_rows: int, global_batch_size: int) -> list[int]:
    """Indices of the rows of optimizer step `step` (from 0): each epoch is one permutation, epochs follow on."""
    start = step * global_batch_size
    epochs = range(start // num_rows, (start + global_batch_size - 1) // num_rows + 1)
    order = np.concatenate([np.random.default_rng([seed, epoch]).permutation(num_rows) for epoch in epochs])
    offset = start - epochs[0] * num_rows
    return order[offset : offset + global_batch_size].tolist()


def micro_batches_of(rows: Sequence[int], plan: BatchPlan, rank: int) -> Iterator[list[int]]:
    """This rank's micro-batches of one global batch; together the ranks cover each row exactly once."""
    unit = plan.micro_batch_size * plan.world_size
    for start in range(rank * plan.micro_batch_size, len(rows), unit):
        yield list(rows[start : start + plan.micro_batch_size])


def collate(rows: Sequence[dict[str, Any]]) -> Batch:
    """Pads rows to the longest of them: int64 tensors [batch, seq] on the CPU.

    Padding is a document of its own (position_ids restart at 0), so attention isolates it as it does any packed
    document and no attention mask is needed. The first token of a document is never a target: the token before
    it belongs to another document.
    """
    length = max(len(row["input_ids"]) for row in rows)
    batch = {
        "input_ids": _padded([row["input_ids"] for row in rows], length, 0),
        "labels": _padded([row["labels"] for row in rows], length, IGNORED),
        "position_ids": _padded([row["position_ids"] for row in rows], length, None),
        "task_ids": _padded([row["task_ids"] for row in rows], length, NO_TASK),
    }
    batch["labels"].masked_fill_(batch["position_ids"] == 0, IGNORED)
    return batch


def empty_batch() -> Batch:
    """One row without labels, for a rank that has no rows left while others do: ZeRO-3 needs its forward."""
    return collate([{"input_ids": [0, 0], "labels": [IGNORED] * 2, "position_ids": [0, 1], "task_ids": [NO_TASK] * 2}])


def _padded(values: Sequence[Sequence[int]], length: int, fill: int | None) -> torch.Tensor:
    """Stacks lists of unequal length; fill None continues with 0, 1, 2, ... as positions of padding."""
    padded = np.empty((len(values), length), dtype=np.int64)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
        row[len(value) :] = np.arange(length - len(value)) if fill is None else fill
    return torch.from_numpy(padded)
