"""Bytes that each rank holds from the first step to the last, by category: exact, computed from the parameters.

What DeepSpeed 0.19.8 keeps; n is the number of adapter elements whose optimizer state a rank holds:

               master copy (fp32)                     gradients                         AdamW's moments (fp32)
    stage 0    4 n, in bf16 only                      n in the compute dtype            8 n
    stage 1    4 n                                    all, in the compute dtype         8 n
    stage 2    4 n                                    n in the compute dtype            8 n
    stage 3    4 n                                    n in the compute dtype            8 n

Offloading the optimizer moves all of these to the host and adds 4 n for fp32 gradients. Stages 1 and 2 cut the adapter
as one flat tensor into parts with an even number of elements; stage 3 cuts each parameter, so that each rank holds
ceil(numel / ranks) of it.

The copy from which a checkpoint is written (trainer/checkpoint/async_saver.py) is counted as on rank 0, which has the
most: 12 n on the host, whole for what replicas hold whole. 8-bit moments add an fp32 copy of both, 8 n, on every rank.

Only LIBRARIES, the bytes that libraries allocate once they work, beyond those after import, has no formula. For a CPU
it was fitted to one configuration of `python -m benchmarks.estimate`, FITTED_ON, and checked there on all others. For a
GPU nothing was measured: it is an allowance for CUDA's context, the buffers of cuBLAS and NCCL, and the caching
allocator's losses. Not included is what glibc's malloc keeps of freed blocks below 32 MB, which it often cannot reuse
for tensors before glibc 2.38: the run does not need it and it varies between runs (docs/memory.md).
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Literal

import torch
from torch import nn

from trainer.base.nf4 import BLOCKS_OF_BLOCKS, NF4Linear
from trainer.estimate.rank_model import RankModel
from trainer.estimate.zero_settings import ZeroSettings

DeviceKind = Literal["cpu", "cuda"]

FP32 = 4  # bytes
LIBRARIES: dict[DeviceKind, int] = {"cpu": 41_000_000, "cuda": 1024**3}
# Of each process group of placed experts on GPUs, not measured: NCCL's buffers, 4 MiB (NCCL_BUFFSIZE) in each direction
# for some 16 channels. Those of the two groups that every run has are in LIBRARIES.
COMMUNICATOR = 2 * 16 * 4 * 2**20
# (ranks, base.quantization, train.activation_checkpointing, experts.parallel_size)
FITTED_ON = (1, "nf4", False, 1)


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one category on a rank's device and on its host."""

    name: str
    device: int = 0
    host: int = 0


def partition(parameter: nn.Parameter, rank_model: RankModel, zero: ZeroSettings) -> int:
    """Elements of a parameter that ZeRO-3 leaves on each rank."""
    trained = parameter.requires_grad
    return -(-parameter.numel() // (rank_model.division(parameter).among.size() if trained else zero.shard_group))


def estimate_resident(
    rank_model: RankModel, zero: ZeroSettings, optimizer: str, world_size: int, kind: DeviceKind
) -> list[MemoryUse]:
    """One MemoryUse per category. Without an accelerator, device and host are the same memory."""
    named = list(rank_model.model.named_parameters())
    sharded = zero.stage == 3
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    absmax = [p for name, p in frozen if name.endswith(".absmax")]
    packed = [p for name, p in frozen if p.dtype == torch.uint8 and not name.endswith(".absmax")]
    plain = [p for _, p in frozen if p.dtype != torch.uint8]
    trained = rank_model.trained

    def elements(parameter: nn.Parameter) -> int:
        return partition(parameter, rank_model, zero) if sharded else parameter.numel()

    def parameters(name: str, which: Iterable[nn.Parameter]) -> MemoryUse:
        size = sum(elements(p) * p.element_size() for p in which)
        return MemoryUse(name, host=size) if sharded and zero.offload_param else MemoryUse(name, device=size)

    return [
        parameters("packed weights", packed),
        parameters("absmax", absmax),
        MemoryUse("absmax, second level", device=_second_level(rank_model.model)),
        parameters("unquantised", plain),
        MemoryUse("kept whole (persistence)", device=_persistent(named, zero, elements)),
        MemoryUse("buffers", device=sum(b.nbytes for b in _buffers(rank_model.model))),
        parameters("adapter", trained),
        *_gradients_and_state(trained, rank_model, zero, optimizer, world_size, elements),
        MemoryUse("reduce bucket", device=_reduce_bucket(trained, rank_model, zero, kind)),
        MemoryUse("libraries", device=LIBRARIES[kind]),
        MemoryUse("expert groups", device=COMMUNICATOR * _communicators(rank_model) if kind == "cuda" else 0),
    ]


def _gradients_and_state(
    trained: list[nn.Parameter],
    rank_model: RankModel,
    zero: ZeroSettings,
    optimizer: str,
    world_size: int,
    elements: Callable[[nn.Parameter], int],
) -> Iterator[MemoryUse]:
    """Gradients and optimizer state, on the host if the optimizer is offloaded; then the checkpoint copy."""
    whole = sum(map(elements, trained))
    owned = 2 * -(-whole // (2 * world_size)) if zero.stage in (1, 2) else whole
    width = rank_model.dtype.itemsize
    gradients = width * (whole if zero.stage == 1 else owned)
    masters = FP32 * owned if zero.stage or width < FP32 else 0
    tensors = [p.numel() for p in trained] if zero.stage == 0 else sub_groups(trained, rank_model, zero, elements)
    if zero.stage in (1, 2):
        tensors = [owned]
    moments = sum(moment_bytes(numel, optimizer) for numel in tensors)
    offloaded = zero.offload_optimizer and zero.stage > 0
    sizes = {
        "gradients": gradients + (FP32 * owned if offloaded else 0),
        "master copy": masters,
        "optimizer moments": moments,
    }
    for name, size in sizes.items():
        yield MemoryUse(name, host=size) if offloaded else MemoryUse(name, device=size)
    in_eight_bits = sum(numel for numel in tensors if _in_eight_bits(numel, optimizer))
    copied = 3 * min(owned, whole) + 2 * in_eight_bits  # owned is padded in stages 1 and 2
    yield MemoryUse("checkpoint copy", host=FP32 * copied)


def _reduce_bucket(trained: Iterable[nn.Parameter], rank_model: RankModel, zero: ZeroSettings, kind: DeviceKind) -> int:
    """ZeRO-3 allocates one bucket for gradients in transit at the start; the other stages allocate in each backward.

    CPU memory is used only once it is written to, so on a CPU the bucket counts up to the whole adapter's gradients.
    """
    if zero.stage != 3:
        return 0
    used = min(zero.reduce_bucket, sum(p.numel() for p in trained)) if kind == "cpu" else zero.reduce_bucket
    return used * rank_model.dtype.itemsize


def sub_groups(
    trained: Iterable[nn.Parameter],
    rank_model: RankModel,
    zero: ZeroSettings,
    elements: Callable[[nn.Parameter], int],
) -> list[int]:
    """Elements of each flat tensor that ZeRO-3's optimizer steps: one per process group, split at sub_group_size."""
    flat: list[int] = []
    for by_expert in (False, True):
        size = whole = 0
        for parameter in trained:
            if (parameter in rank_model.by_expert) == by_expert:
                size, whole = size + elements(parameter), whole + parameter.numel()
                if whole >= zero.sub_group:
                    flat.append(size)
                    size = whole = 0
        flat += [size] if size else []
    return flat


def moment_bytes(numel: int, optimizer: str) -> int:
    """Bytes of a tensor's two moments: fp32, or bitsandbytes' 8 bits with one fp32 maximum per 256 elements.

    bitsandbytes keeps the moments of tensors below 4096 elements in fp32.
    """
    if not _in_eight_bits(numel, optimizer):
        return 2 * FP32 * numel
    return 2 * (numel + FP32 * -(-numel // 256))


def _in_eight_bits(numel: int, optimizer: str) -> bool:
    return optimizer != "adamw" and numel >= 4096


def _second_level(model: nn.Module) -> int:
    """Per packed linear, whole on every rank, in fp32: maxima of blocks of blocks, an offset, the 256-value code."""
    counts = [m.absmax.numel() for m in model.modules() if isinstance(m, NF4Linear)]
    return sum(FP32 * (-(-blocks // BLOCKS_OF_BLOCKS) + 1 + 256) for blocks in counts)


def _communicators(rank_model: RankModel) -> int:
    """Process groups of several ranks that the adapter adds (`make_adapter_groups`)."""
    groups = rank_model.groups
    copies = [division.copies.size() for division in (groups.experts, groups.shared) if division.copies is not None]
    sizes = {("neighbours", groups.size), ("neighbours", groups.shared.among.size()), *(("copies", n) for n in copies)}
    if groups.size > 1:
        sizes.add(("owners", groups.experts.among.size()))
    return sum(1 < size < groups.shared.ranks for _, size in sizes)  # a group of all ranks is that of the run


def _persistent(
    named: Iterable[tuple[str, nn.Parameter]], zero: ZeroSettings, elements: Callable[[nn.Parameter], int]
) -> int:
    """Small parameters that ZeRO-3 keeps whole beside their shards once it has gathered them."""
    if zero.stage != 3:
        return 0
    small = [p for _, p in named if p.numel() <= zero.persistence and elements(p) < p.numel()]
    return sum(p.numel() * p.element_size() for p in small)


def _buffers(model: nn.Module) -> Iterator[torch.Tensor]:
    return (buffer for buffer in model.buffers() if not buffer.is_meta)
