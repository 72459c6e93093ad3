"""The gradients of a step's micro-batches, added up beside training in fp64."""

from typing import Any

import torch
from torch import Tensor

from trainer.distributed.deepspeed_internals import whole_shape


class SummedGradient:
    """A parameter's gradients of one rank: each as autograd makes it, added up in fp64, and what is then reduced."""

    def __init__(self, parameter: Any) -> None:
        shape = whole_shape(parameter)
        self.exact, self.sizes = torch.zeros(shape, dtype=torch.float64), torch.zeros(shape, dtype=torch.float64)
        self.found = torch.zeros(shape)
        parameter.register_hook(self._add)
        parameter.register_post_accumulate_grad_hook(self._look)

    def excess(self) -> float:
        """Over all elements the largest error beyond one rounding to bf16 and those of 32 additions in fp32."""
        allowed = 2**-8 * self.exact.abs() + 2**-19 * self.sizes
        return float(((self.found - self.exact).abs() - allowed).max())

    def _add(self, gradient: Tensor) -> None:
        self.exact += gradient
        self.sizes += gradient.abs()

    def _look(self, parameter: Any) -> None:
        if parameter.grad is not None:  # in the end
            self.found = parameter.grad.float()
