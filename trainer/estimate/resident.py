"""Bytes that a rank holds from the first step to the last, by category: exact, from the parameters themselves.

What DeepSpeed 0.19.8 keeps, n being the elements of the adapter whose optimizer state a rank has:

               master copy (fp32)                     gradients                         AdamW's moments (fp32)
    stage 0    4 n, in bf16 only                      n in the compute dtype            8 n
    stage 1    4 n                                    all, in the compute dtype         8 n
    stage 2    4 n                                    n in the compute dtype            8 n
    stage 3    4 n                                    n in the compute dtype            8 n

Offloading the optimizer puts all of these on the host, and 4 n for the gradients in fp32 beside them. Stages 1 and 2
cut the adapter as one flat tensor, into even numbers of elements; stage 3 cuts each parameter, so that a rank has
ceil(numel / ranks) of it.

The copy from which a checkpoint is written (trainer/checkpoint/saver.py) is rank 0's, which has the most: 12 n on the
host, of what replicas hold whole all of it. Moments in 8 bits add an fp32 copy of both, 8 n, on every rank.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import nn

from trainer.base.nf4 import BLOCKS_OF_BLOCKS, NF4Linear
from trainer.estimate.measured import LIBRARIES, DeviceKind
from trainer.estimate.rank_model import RankModel
from trainer.estimate.zero_settings import ZeroSettings

FP32 = 4  # bytes


@dataclass(frozen=True)
class MemoryUse:
    """Bytes of one category that a rank holds on its device and on its host."""

    name: str
    device: int = 0
    host: int = 0


def partition(parameter: nn.Parameter, rank_model: RankModel, world_size: int) -> int:
    """Elements of a parameter that ZeRO-3 leaves on each rank."""
    ranks = world_size
    if parameter in rank_model.by_expert:
        ranks = rank_model.placement.groups.partitions
    return -(-parameter.numel() // ranks)


def resident(
    rank_model: RankModel, zero: ZeroSettings, optimizer: str, world_size: int, kind: DeviceKind
) -> list[MemoryUse]:
    """All categories; on a machine without an accelerator "device" and "host" are the same memory."""
    named = list(rank_model.model.named_parameters())
    sharded = zero.stage == 3
    frozen = [(name, p) for name, p in named if not p.requires_grad]
    absmax = [p for name, p in frozen if name.endswith(".absmax")]
    packed = [p for name, p in frozen if p.dtype == torch.uint8 and not name.endswith(".absmax")]
    plain = [p for _, p in frozen if p.dtype != torch.uint8]
    trained = [p for _, p in named if p.requires_grad]

    def elements(parameter: nn.Parameter) -> int:
        return partition(parameter, rank_model, world_size) if sharded else parameter.numel()

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
        *_learning(trained, rank_model, zero, optimizer, world_size, elements),
        MemoryUse("reduce bucket", device=_reduce_bucket(trained, rank_model, zero, kind)),
        MemoryUse("libraries", device=LIBRARIES[kind]),
    ]


def _learning(
    trained: list[nn.Parameter],
    rank_model: RankModel,
    zero: ZeroSettings,
    optimizer: str,
    world_size: int,
    elements: Callable[[nn.Parameter], int],
) -> Iterator[MemoryUse]:
    """Gradients and optimizer state, all on the host where the optimizer is offloaded; and copies for checkpoints."""
    whole = sum(map(elements, trained))
    learned = 2 * -(-whole // (2 * world_size)) if zero.stage in (1, 2) else whole
    width = rank_model.dtype.itemsize
    gradients = width * (whole if zero.stage == 1 else learned)
    masters = FP32 * learned if zero.stage or width < FP32 else 0
    tensors = [p.numel() for p in trained] if zero.stage == 0 else sub_groups(trained, rank_model, zero, elements)
    if zero.stage in (1, 2):
        tensors = [learned]
    moments = sum(moment_bytes(numel, optimizer) for numel in tensors)
    offloaded = zero.offload_optimizer and zero.stage > 0
    sizes = {
        "gradients": gradients + (FP32 * learned if offloaded else 0),
        "master copy": masters,
        "optimizer moments": moments,
    }
    for name, size in sizes.items():
        yield MemoryUse(name, host=size) if offloaded else MemoryUse(name, device=size)
    in_eight_bits = sum(numel for numel in tensors if _in_eight_bits(numel, optimizer))
    copied = 3 * min(learned, whole) + 2 * in_eight_bits  # learned is padded in stages 1 and 2
    yield MemoryUse("checkpoint copy", host=FP32 * copied)


def _reduce_bucket(trained: Iterable[nn.Parameter], rank_model: RankModel, zero: ZeroSettings, kind: DeviceKind) -> int:
    """ZeRO-3 reserves its bucket for gradients on their way once; the others make theirs in each backward.

    On a CPU memory is there once it is written to: as far as the gradients of all ranks' parameters reach.
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
    """Elements of the flat tensors that ZeRO-3's optimizer steps: one a process group, cut at sub_group_size."""
    flat: list[int] = []
    for group in (False, True):
        size = begun = 0
        for parameter in trained:
            if (parameter in rank_model.by_expert) == group:
                size, begun = size + elements(parameter), begun + parameter.numel()
                if begun >= zero.sub_group:
                    flat.append(size)
                    size = begun = 0
        flat += [size] if size else []
    return flat


def moment_bytes(numel: int, optimizer: str) -> int:
    """Two moments of a tensor: fp32, or bitsandbytes' 8 bits with an fp32 maximum a block of 256 elements.

    bitsandbytes keeps tensors below 4096 elements in fp32.
    """
    if not _in_eight_bits(numel, optimizer):
        return 2 * FP32 * numel
    return 2 * (numel + FP32 * -(-numel // 256))


def _in_eight_bits(numel: int, optimizer: str) -> bool:
    return optimizer != "adamw" and numel >= 4096


def _second_level(model: nn.Module) -> int:
    """Of each packed linear fp32 maxima of blocks of blocks, their mean and the code's 256 values; on every rank."""
    counts = [m.absmax.numel() for m in model.modules() if isinstance(m, NF4Linear)]
    return sum(FP32 * (-(-blocks // BLOCKS_OF_BLOCKS) + 1 + 256) for blocks in counts)


def _persistent(
    named: Iterable[tuple[str, nn.Parameter]], zero: ZeroSettings, elements: Callable[[nn.Parameter], int]
) -> int:
    """Small parameters that ZeRO-3, once it has gathered them, keeps whole beside the shards."""
    if zero.stage != 3:
        return 0
    small = [p for _, p in named if p.numel() <= zero.persistence and elements(p) < p.numel()]
    return sum(p.numel() * p.element_size() for p in small)


def _buffers(model: nn.Module) -> Iterator[torch.Tensor]:
    return (buffer for buffer in model.buffers() if not buffer.is_meta)
