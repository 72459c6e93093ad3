"""A step's gradients: its micro-batches' are added up on each rank, in fp32, and reduced over the ranks once.

DeepSpeed adds up in the compute dtype, and under ZeRO-2 and 3 reduces after every micro-batch. In bf16 a sum of many
micro-batches then stops growing, and across nodes every reduction costs as much as the last.

Where there are several copies of what learns (trainer.distributed.adapter_groups), DeepSpeed reduces within one. The
others' gradients are added before: each rank sums its part over its group, and then over the copies, so that only parts
cross between groups.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn import functional as F

from trainer.distributed.adapter_groups import Division, sum_at_owner

BUCKET = 2**24  # elements whose gradients are summed over copies at once


class GradientAccumulation:
    """Makes the backward passes of an engine's steps.

    micro_batches: of each step, on each rank. divided: what learns, by where its parts are. One micro-batch and one
    copy need nothing of this, and ZeRO may then reduce while backward goes on.
    """

    def __init__(
        self, engine: Any, micro_batches: int, divided: Sequence[tuple[Sequence[nn.Parameter], Division]] = ()
    ) -> None:
        self._engine = engine
        self._copied = [(parameters, division) for parameters, division in divided if division.copies is not None]
        self._once = engine.zero_optimization() and (micro_batches > 1 or bool(self._copied))
        self._trained = [p for p in engine.module.parameters() if p.requires_grad]
        self._sums: dict[nn.Parameter, Tensor] = {}
        self._at_last = True
        if micro_batches > 1:
            for parameter in self._trained:
                if parameter.dtype != torch.float32:  # torch adds up in the parameter's dtype
                    parameter.register_post_accumulate_grad_hook(self._add)

    @contextmanager
    def step(self) -> Iterator[None]:
        """Around the micro-batches of one step. When it ends, gradients are those of the whole step, reduced."""
        self._engine.set_gradient_accumulation_boundary(True)  # so it is again when coalesce_grad_reduction has ended
        with self._engine.coalesce_grad_reduction() if self._once else nullcontext():
            try:
                yield
            except BaseException:
                # DeepSpeed would still reduce what there is, and wait for ranks that do not come to it.
                for parameter in self._trained:
                    parameter.grad = None
                raise
            for parameters, division in self._copied:
                for bucket in _buckets(parameters):
                    _add_copies(bucket, division)

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch. last: of the step. Collective: every rank must call it."""
        self._at_last = last
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def _add(self, parameter: nn.Parameter) -> None:
        """Moves the new gradient into the sum; after the last micro-batch, the sum into the gradient."""
        gradient = _gradient(parameter)
        total = self._sums.pop(parameter, None)
        if not self._at_last:
            self._sums[parameter] = gradient.float() if total is None else total.add_(gradient)
            parameter.grad = None
        elif total is not None:
            gradient.copy_(total.add_(gradient))


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    bucket: list[nn.Parameter] = []
    size = 0
    for parameter in parameters:
        bucket.append(parameter)
        size += _gradient(parameter).numel()
        if size >= BUCKET:
            yield bucket
            bucket, size = [], 0
    if bucket:
        yield bucket


@torch.no_grad()
def _add_copies(parameters: Sequence[nn.Parameter], division: Division) -> None:
    """Makes each gradient this rank's part of the sum over all ranks, and zero elsewhere, so that a sum is that sum.

    Parts are ZeRO-3's: of each parameter runs of equal length, the last one padded.
    """
    assert division.copies is not None
    ranks, rank = division.among.size(), division.among.rank()
    gradients = [_gradient(parameter).view(-1) for parameter in parameters]
    lengths = [-(-gradient.numel() // ranks) for gradient in gradients]
    padded = [
        F.pad(gradient, (0, ranks * n - gradient.numel())) for gradient, n in zip(gradients, lengths, strict=True)
    ]
    mine = sum_at_owner(torch.cat([p.view(ranks, -1) for p in padded], 1), division.among)
    dist.all_reduce(mine, group=division.copies)
    for gradient, part, length in zip(gradients, mine.split(lengths), lengths, strict=True):
        place = gradient.zero_()[rank * length : (rank + 1) * length]
        place.copy_(part[: place.numel()])


def _gradient(parameter: nn.Parameter) -> Tensor:
    assert parameter.grad is not None  # every parameter takes part in every micro-batch
    return parameter.grad
