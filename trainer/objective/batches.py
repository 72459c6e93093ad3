"""Which rows go to which rank at which step, as pure functions of (seed, step): no state has to be saved."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, TypedDict, cast

import numpy as np
import torch

from data_prep.encode import IGNORED
from data_prep.user_error import UserError

NO_TASK = -1  # task id of padding
GPU_MULTIPLE = 64
"""Of this many tokens rows are a multiple on a GPU, where matrices [rank, tokens] of other sizes multiply slowly."""


class Batch(TypedDict):
    """A micro-batch. All that depends on its values is found on the CPU: on a GPU the host would have to wait for it.

    input_ids, labels, position_ids, task_ids: int64 [batch, seq].
    predicting: int64 [labelled tokens], the places that predict them, counted over all rows: each is one before.
    document_starts: int32 [documents + 1], counted over all rows, padding included; the last is the end.
    longest_document: tokens.
    """

    input_ids: torch.Tensor
    labels: torch.Tensor
    position_ids: torch.Tensor
    task_ids: torch.Tensor
    predicting: torch.Tensor
    document_starts: torch.Tensor
    longest_document: int


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


def collate(rows: Sequence[dict[str, Any]], multiple: int = 1) -> Batch:
    """Pads rows to the longest of them, on the CPU, rounded up to a multiple of so many tokens.

    Padding is a document of its own (position_ids restart at 0), so attention isolates it as it does any packed
    document and no attention mask is needed. The first token of a document is never a target: the token before
    it belongs to another document.
    """
    length = padded_length(max(len(row["input_ids"]) for row in rows), multiple)
    labels = _padded([row["labels"] for row in rows], length, IGNORED)
    positions = _padded([row["position_ids"] for row in rows], length, None)
    labels[positions == 0] = IGNORED
    starts = np.append(np.flatnonzero(positions == 0), positions.size)
    of_row, before = (labels[:, 1:] != IGNORED).nonzero()
    return {
        "input_ids": torch.from_numpy(_padded([row["input_ids"] for row in rows], length, 0)),
        "labels": torch.from_numpy(labels),
        "position_ids": torch.from_numpy(positions),
        "task_ids": torch.from_numpy(_padded([row["task_ids"] for row in rows], length, NO_TASK)),
        "predicting": torch.from_numpy(of_row * length + before),
        "document_starts": torch.from_numpy(starts.astype(np.int32)),
        "longest_document": int(np.diff(starts).max()),
    }


def padded_length(tokens: int, multiple: int) -> int:
    """The length of rows whose longest has so many tokens."""
    return -(-tokens // multiple) * multiple


def move(batch: Batch, device: torch.device) -> Batch:
    """The same batch with its tensors on a device."""
    tensors = {n: v.to(device, non_blocking=True) for n, v in batch.items() if isinstance(v, torch.Tensor)}
    return cast(Batch, {**batch, **tensors})


def of_labelled(column: torch.Tensor, batch: Batch) -> torch.Tensor:
    """The entries of labels or task_ids at a batch's labelled tokens: int64 [labelled tokens]."""
    return column.flatten()[batch["predicting"] + 1]


def count_tokens(batches: Sequence[Batch]) -> tuple[int, int]:
    """(labelled, real) tokens of batches that are still on the CPU."""
    labelled = sum(len(batch["predicting"]) for batch in batches)
    return labelled, sum(int((batch["task_ids"] != NO_TASK).sum()) for batch in batches)


def empty_batch() -> Batch:
    """One row without labels, for a rank that has no rows left while others do: ZeRO-3 needs its forward."""
    return collate([{"input_ids": [0, 0], "labels": [IGNORED] * 2, "position_ids": [0, 1], "task_ids": [NO_TASK] * 2}])


def _padded(values: Sequence[Sequence[int]], length: int, fill: int | None) -> np.ndarray:
    """Stacks lists of unequal length; fill None continues with 0, 1, 2, ... as positions of padding."""
    padded = np.empty((len(values), length), dtype=np.int64)
    for row, value in zip(padded, values, strict=True):
        row[: len(value)] = value
        row[len(value) :] = np.arange(length - len(value)) if fill is None else fill
    return padded
