"""Merges updates with constant gates into the base's weights, and writes an ordinary transformers folder.

Writes one file at a time: besides the run's own model, memory holds the tensors of one file and one update.
"""

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.base.nf4 import NF4Linear
from trainer.base.safetensors_reader import Weights
from trainer.base.safetensors_writer import write_tensors
from trainer.base.weight_map import DTYPES, OpenedBase
from trainer.export.base_files import write_config
from trainer.export.lora import LowRank

SHARD = 2 * 10**9  # approximate bytes per file; a larger tensor gets its own file


def write_merged(
    folder: Path,
    opened: OpenedBase,
    updates: dict[str, LowRank],
    dequantized: nn.Module | None = None,
    shard_bytes: int = SHARD,
) -> int:
    """Writes the base's files with each weight in `updates` replaced by W + b a, in the run's compute dtype.

    Returns the total bytes. W comes from the base's files or, if the run's base model is given as `dequantized`, from
    its NF4 linears; then the NF4 linears without an update are written dequantized too. The sum is computed in fp32 and
    rounded once. Tensors keep the names they have in the base's files; those that the model's class does not know are
    written as they are. No tokenizer is written.
    """
    dtype = DTYPES[opened.base.dtype]
    files: dict[str, str] = {}
    shards = list(_shards(opened, dtype, shard_bytes))
    for number, sources in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {source: _written(opened, source, dtype, updates, dequantized) for source in sources}
        write_tensors(tensors, folder / name)
        files |= dict.fromkeys(sources, name)
    total = sum(_nbytes(opened, source, dtype) for sources in shards for source in sources)
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    write_config(opened.weights.folder, folder, dtype)
    return total


def _shards(opened: OpenedBase, dtype: torch.dtype, most: int) -> Iterator[list[str]]:
    """The tensor names of each file, in the base's order, up to `most` bytes per file."""
    shard: list[str] = []
    filled = 0
    for source in (*opened.names, *opened.unplaced):
        size = _nbytes(opened, source, dtype)
        if shard and filled + size > most:
            yield shard
            shard, filled = [], 0
        shard.append(source)
        filled += size
    yield shard


def _nbytes(opened: OpenedBase, source: str, dtype: torch.dtype) -> int:
    """Of a tensor as it is written."""
    weights = opened.weights
    return weights.numel(source) * dtype.itemsize if source in opened.names else weights.nbytes(source)


def _written(
    opened: OpenedBase, source: str, dtype: torch.dtype, updates: dict[str, LowRank], dequantized: nn.Module | None
) -> Tensor:
    if source not in opened.names:
        return opened.weights.stored(source)
    return _merged(opened, source, updates, dequantized).to(dtype)


@torch.no_grad()
def _merged(opened: OpenedBase, source: str, updates: dict[str, LowRank], dequantized: nn.Module | None) -> Tensor:
    """One tensor of the base's files, plus its update in fp32 if it has one."""
    owner = opened.names[source].rpartition(".")[0]
    weight = _dequantized(dequantized, opened.names[source]) if dequantized is not None else None
    if weight is None:
        weight = _read(opened.weights, source)
    is_updated = owner in updates and opened.names[source].endswith(".weight")
    return weight.float() + updates[owner].update() if is_updated else weight


def _dequantized(model: nn.Module, target: str) -> Tensor | None:
    """The weight `target` dequantized to fp32, or None if the model does not store it as NF4."""
    owner, _, attribute = target.rpartition(".")
    module = model.get_submodule(owner)
    linear = getattr(module, "base_layer", module)
    if not isinstance(linear, NF4Linear) or attribute != "weight":
        return None
    return linear.dequantized(torch.float32).cpu()


def _read(weights: Weights, source: str) -> Tensor:
    numel = weights.numel(source)
    return torch.cat(list(weights.read(source, 0, numel, max(numel, 1)))).view(weights.shape(source))
