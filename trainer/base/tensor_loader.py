"""Reads one tensor of the files into its place in the model: only this rank's part of it, one piece at a time."""

import math

import torch
from torch import Tensor, nn

from trainer.base.nf4 import BLOCK, NF4Linear, SecondLevel, compress_absmax, quantize_blocks
from trainer.base.safetensors_reader import Weights
from trainer.base.sharding import ShardingStrategy, shard_range

BLOCK_BYTES = BLOCK // 2
# Elements read at once, whole blocks. On a CPU a small piece stays in the cache while bitsandbytes makes temporaries of
# 16 bytes per element; on a GPU a large piece saves kernel launches.
PIECE = {"cpu": 2**17, "cuda": 2**22}


def fill(model: nn.Module, target: str, weights: Weights, source: str, shards: ShardingStrategy) -> None:
    """Puts the tensor `source` of the files in the place of `target`, quantised where the target is an NF4Linear's.

    Collective: every rank calls it for the same tensors in the same order; each NF4 weight takes one collective.
    """
    owner, _, attribute = target.rpartition(".")
    module = model.get_submodule(owner)
    shape = weights.shape(source)
    if isinstance(module, NF4Linear) and attribute == "weight":
        packed, codes, module.second = quantized_run(weights, source, shards)
        module.weight = shards.keep(packed, module.weight.shape)
        module.absmax = shards.keep(codes, module.absmax.shape)
    elif attribute in module._parameters:
        dtype = getattr(module, attribute).dtype
        module._parameters[attribute] = shards.keep(plain_run(weights, source, dtype, shards), shape)
    else:  # a persistent buffer: small, and whole on every rank
        read_whole(weights, source, getattr(module, attribute))


def plain_run(weights: Weights, source: str, dtype: torch.dtype, shards: ShardingStrategy) -> Tensor:
    """This rank's run of a tensor that stays as it is, in `dtype`."""
    numel = math.prod(weights.shape(source))
    start, stop = shard_range(numel, shards.rank, shards.world)
    run = shards.allocate(numel, dtype)
    position = 0
    for piece in weights.read(source, start, stop, PIECE[shards.device.type]):
        run[position : position + piece.numel()] = piece
        position += piece.numel()
    return run


def quantized_run(weights: Weights, source: str, shards: ShardingStrategy) -> tuple[Tensor, Tensor, SecondLevel]:
    """This rank's runs of the packed weight and of its absmax, and the second level, which is whole.

    Runs are cut in bytes, so one may begin inside a block: both its ranks then read and quantise that block. Its
    maximum comes from the rank that holds its first byte.
    """
    numel = math.prod(weights.shape(source))
    size, blocks = -(-numel // 2), -(-numel // BLOCK)
    start, stop = shard_range(size, shards.rank, shards.world)
    first, last = start // BLOCK_BYTES, -(-stop // BLOCK_BYTES)
    pieces = weights.read(source, first * BLOCK, min(last * BLOCK, numel), PIECE[shards.device.type])
    packed = shards.allocate(size, torch.uint8)
    absmax = torch.zeros(last - first, dtype=torch.float32, device=shards.device)
    block = first
    for codes, maxima in quantize_blocks(piece.to(shards.device) for piece in pieces):
        _lay(packed[: stop - start], codes, block * BLOCK_BYTES - start)
        _lay(absmax, maxima, block - first)
        block += maxima.numel()
    codes, second = compress_absmax(_gather_absmax(absmax, first, size, shards))
    run = shards.allocate(blocks, torch.uint8)
    start, stop = shard_range(blocks, shards.rank, shards.world)
    run[: stop - start] = codes[start:stop]
    return packed, run, second


def read_whole(weights: Weights, source: str, into: Tensor) -> None:
    """Reads all of a small tensor into a tensor of the same shape."""
    numel = math.prod(weights.shape(source))
    flat = torch.cat(list(weights.read(source, 0, numel, max(numel, 1))))
    into.copy_(flat.view(into.shape))


def _gather_absmax(absmax: Tensor, first: int, size: int, shards: ShardingStrategy) -> Tensor:
    """All maxima of a tensor [blocks], on every rank, from those of each rank's run (this rank's begin at `first`).

    Collective: every rank must call it. Moves 1/16 byte per element of the tensor.
    """
    owned = [_blocks_begun(size, rank, shards.world) for rank in range(shards.world)]
    longest = max(stop - start for start, stop in owned)
    start, stop = owned[shards.rank]
    mine = torch.zeros(longest, dtype=torch.float32, device=absmax.device)
    mine[: stop - start] = absmax[start - first : stop - first]
    parts = shards.gather(mine).split(longest)
    return torch.cat([part[: stop - start] for part, (start, stop) in zip(parts, owned, strict=True)])


def _blocks_begun(size: int, rank: int, world: int) -> tuple[int, int]:
    """The blocks whose first byte lies in a rank's run of `size` packed bytes."""
    start, stop = shard_range(size, rank, world)
    return -(-start // BLOCK_BYTES), -(-stop // BLOCK_BYTES)


def _lay(target: Tensor, values: Tensor, position: int) -> None:
    """Copies `values` to `target[position:]`, dropping what falls off either end."""
    start, stop = max(position, 0), min(position + values.numel(), target.numel())
    if start < stop:
        target[start:stop] = values[start - position : stop - position]
