"""A base with fixed-gate updates added to its weights, as an ordinary transformers folder.

Written a tensor at a time, a file at a time: beside the run's own model, memory holds one file and one update.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from trainer.base.nf4 import NF4Linear
from trainer.base.safetensors_reader import Weights
from trainer.base.safetensors_writer import write_tensors
from trainer.base.weight_map import DTYPES, OpenedBase
from trainer.export.lora import LowRank

SHARD = 2 * 10**9  # bytes of a file, about; a larger tensor has one of its own
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def write_merged(
    folder: Path,
    opened: OpenedBase,
    updates: dict[str, LowRank],
    dequantised: nn.Module | None = None,
    shard_bytes: int = SHARD,
) -> int:
    """The base's files with every weight in `updates` replaced by W + b a, in the run's compute dtype; their bytes.

    W is what the base's files hold, or, with the run's base model given as `dequantised`, what its NF4 linears
    dequantise to: then those without an update are written so as well. The sum is formed in fp32 and rounded once.
    Tensors keep their names in the files. No tokenizer is written.
    """
    dtype = DTYPES[opened.base.dtype]
    files: dict[str, str] = {}
    shards = list(_shards(opened, dtype, shard_bytes))
    for number, sources in enumerate(shards, 1):
        name = f"model-{number:05}-of-{len(shards):05}.safetensors" if len(shards) > 1 else "model.safetensors"
        tensors = {source: _merged(opened, source, updates, dequantised).to(dtype) for source in sources}
        write_tensors(tensors, folder / name)
        files |= dict.fromkeys(sources, name)
    total = sum(opened.weights.numel(source) for source in opened.names) * dtype.itemsize
    if len(shards) > 1:
        index = {"metadata": {"total_size": total}, "weight_map": files}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n")
    _write_config(folder, opened, dtype)
    return total


def _shards(opened: OpenedBase, dtype: torch.dtype, most: int) -> Iterator[list[str]]:
    """Names of the tensors of each file, in the base's order, of about `most` bytes."""
    shard: list[str] = []
    filled = 0
    for source in opened.names:
        size = opened.weights.numel(source) * dtype.itemsize
        if shard and filled + size > most:
            yield shard
            shard, filled = [], 0
        shard.append(source)
        filled += size
    yield shard


@torch.no_grad()
def _merged(opened: OpenedBase, source: str, updates: dict[str, LowRank], dequantised: nn.Module | None) -> Tensor:
    """One tensor of the files with its update, if it has one: fp32 then."""
    owner = opened.names[source].rpartition(".")[0]
    weight = _dequantised(dequantised, opened.names[source]) if dequantised is not None else None
    if weight is None:
        weight = _read(opened.weights, source)
    is_updated = owner in updates and opened.names[source].endswith(".weight")
    return weight.float() + updates[owner].update() if is_updated else weight


def _dequantised(model: nn.Module, target: str) -> Tensor | None:
    """The weight `target` in fp32 as NF4 keeps it, or None where the model does not keep it in NF4."""
    owner, _, attribute = target.rpartition(".")
    module = model.get_submodule(owner)
    linear = getattr(module, "base_layer", module)
    if not isinstance(linear, NF4Linear) or attribute != "weight":
        return None
    return linear.dequantized(torch.float32).cpu()


def _read(weights: Weights, source: str) -> Tensor:
    numel = weights.numel(source)
    return torch.cat(list(weights.read(source, 0, numel, max(numel, 1)))).view(weights.shape(source))


def _write_config(folder: Path, opened: OpenedBase, dtype: torch.dtype) -> None:
    base = opened.weights.folder
    config = json.loads((base / "config.json").read_text())
    config.pop("torch_dtype", None)
    (folder / "config.json").write_text(json.dumps({**config, "dtype": NAMES[dtype]}, indent=2) + "\n")
    also = [base / "generation_config.json", *(base.glob("*.py") if opened.base.trust_remote_code else ())]
    for path in also:
        if path.is_file():
            shutil.copy(path, folder / path.name)
