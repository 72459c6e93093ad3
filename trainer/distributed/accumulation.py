"""A step's gradients: its micro-batches' are added up on each rank, in fp32, and reduced over the ranks once.

DeepSpeed adds up in the compute dtype, and under ZeRO-2 and 3 reduces after every micro-batch. In bf16 a sum of many
micro-batches then stops growing, and across nodes every reduction costs as much as the last.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn


class GradientAccumulation:
    """Makes the backward passes of an engine's steps.

    micro_batches: of each step, on each rank. One needs no adding up, and ZeRO may then reduce while backward goes on.
    """

    def __init__(self, engine: Any, micro_batches: int) -> None:
        self._engine, self._micro_batches = engine, micro_batches
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
        several = self._micro_batches > 1 and self._engine.zero_optimization()
        with self._engine.coalesce_grad_reduction() if several else nullcontext():
            try:
                yield
            except BaseException:
                # DeepSpeed would still reduce what there is, and wait for ranks that do not come to it.
                for parameter in self._trained:
                    parameter.grad = None
                raise

    def backward(self, loss: Tensor, last: bool) -> None:
        """Adds the gradients of one micro-batch. last: of the step. Collective: every rank must call it."""
        self._at_last = last
        self._engine.set_gradient_accumulation_boundary(last)
        self._engine.backward(loss)

    def _add(self, parameter: nn.Parameter) -> None:
        """Moves the new gradient into the sum; after the last micro-batch, the sum into the gradient."""
        gradient = parameter.grad
        assert gradient is not None
        total = self._sums.pop(parameter, None)
        if not self._at_last:
            self._sums[parameter] = gradient.float() if total is None else total.add_(gradient)
            parameter.grad = None
        elif total is not None:
            gradient.copy_(total.add_(gradient))
