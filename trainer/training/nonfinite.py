"""Finds the layer at which numbers first stopped being finite, by running a step's micro-batches once more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.objective.batches import Batch

Visit = Callable[[str, Tensor], None]


def find_nonfinite_layers(engine: Any, batches: Sequence[Batch], backward: bool) -> str:
    """`rank 1: model.layers.3.mlp.down_proj` for each rank where a layer's output, or its gradient, is not finite.

    Empty where every layer is finite. Collective: every rank calls it with its micro-batches. With `backward` it looks
    at gradients and goes backward once more, so the run must end after it.
    """
    found: list[str] = []

    def visit(name: str, values: Tensor) -> None:
        if not found and not torch.isfinite(values).all():
            found.append(name)

    with _visited_layers(engine.module, visit, backward), torch.set_grad_enabled(backward):
        for batch in batches:
            engine.module.router_stats.begin_micro_batch(batch["task_ids"])
            loss, _ = engine(batch, 1, 1.0)
            if backward:
                engine.backward(loss)
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    return "; ".join(f"rank {rank}: {names[0]}" for rank, names in enumerate(everyone) if names)


@contextmanager
def _visited_layers(module: Any, visit: Visit, backward: bool) -> Iterator[None]:
    """Within, passes each layer's output to `visit`, inner layers first; or its gradient, the last layer first."""

    def make_hook(name: str) -> Callable[..., None]:
        def hook(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not backward:
                visit(name, output)
            elif output.requires_grad:
                output.register_hook(lambda gradient: visit(name, gradient))

        return hook

    base = module.model.get_base_model()
    handles = [layer.register_forward_hook(make_hook(name)) for name, layer in base.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
