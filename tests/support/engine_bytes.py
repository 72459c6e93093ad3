"""Bytes that DeepSpeed's engine holds, read from its tensors."""

from collections.abc import Iterable
from typing import Any

import torch

from trainer.checkpoint.async_saver import AsyncSaver
from trainer.distributed.deepspeed_internals import fp32_copies


def learning_bytes(engine: Any) -> dict[str, int]:
    """Bytes of the storages of master copies, moments and gradient buffers after a step."""
    wrapper = engine.optimizer
    flat = getattr(wrapper, "fp32_partitioned_groups_flat", None) or getattr(
        wrapper, "single_partition_of_fp32_groups", None
    )
    masters = list(flat) if flat is not None else list(fp32_copies(wrapper).values())
    state = [item for tensors in engine.basic_optimizer.state.values() for item in tensors.items()]
    moments = [t for name, t in state if torch.is_tensor(t) and t.dim() and not name.startswith("qmap")]  # a constant
    gradients = [getattr(wrapper, "grad_partitions_flat_buffer", None), *(m.grad for m in masters)]
    return {
        "master copy": storage_bytes(masters),
        "optimizer moments": storage_bytes(moments),
        "gradients": storage_bytes(g for g in gradients if g is not None),
    }


def copied_bytes(saver: AsyncSaver) -> int:
    """Copies for checkpoints: what a save is written from, and fp32 copies of 8-bit moments."""
    return storage_bytes([*saver._copies, *(moment.copy for moment in saver.state._quantized)])


def storage_bytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values())
