"""Names the layer at which numbers first stopped being finite, by running the micro-batches of a step once more."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from trainer.objective.batches import Batch

Note = Callable[[str, Tensor], None]


def find_nonfinite_layers(engine: Any, batches: Sequence[Batch], backward: bool) -> str:
    """`rank 1: model.layers.3.mlp.down_proj` of each rank where a layer's output, or its gradient, is not finite.

    Every rank takes part, with its micro-batches. For a gradient (`backward`) it goes backward once more: the run must
    end after it. Empty where every layer is finite.
    """
    found: list[str] = []

    def note(name: str, values: Tensor) -> None:
        if not found and not torch.isfinite(values).all():
            found.append(name)

    with _watched(engine.module, note, backward), torch.set_grad_enabled(backward):
        for batch in batches:
            engine.module.router_stats.begin_micro_batch(batch["task_ids"])
            loss, _ = engine(batch, 1, 1.0)
            if backward:
                engine.backward(loss)
    everyone: list[list[str]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(everyone, found)
    return "; ".join(f"rank {rank}: {names[0]}" for rank, names in enumerate(everyone) if names)


@contextmanager
def _watched(module: nn.Module, note: Note, backward: bool) -> Iterator[None]:
    """Shows `note` each layer's output as it comes, an inner layer's first; or its gradient, the last layer's first."""

    def hook(name: str) -> Callable[..., None]:
        def seen(_module: nn.Module, _inputs: Any, output: Any) -> None:
            if not isinstance(output, Tensor) or not output.is_floating_point():
                return
            if not backward:
                note(name, output)
            elif output.requires_grad:
                output.register_hook(lambda gradient: note(name, gradient))

        return seen

    base = module.model.get_base_model()
    handles = [layer.register_forward_hook(hook(name)) for name, layer in base.named_modules() if name]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
