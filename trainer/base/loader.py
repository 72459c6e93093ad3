"""Loads the frozen base: built on meta, read piece by piece, its linears quantised as they are read.

Every nn.Linear except the output embedding is quantised; the rest is stored in the compute dtype. NF4 is computed from
the values in the files. No rank ever holds more than its own part of a parameter and one piece of a few megabytes.
"""

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from trainer.base.nf4 import NF4Linear
from trainer.base.sharding import ShardingStrategy, Unsharded
from trainer.base.tensor_loader import fill
from trainer.base.weight_map import DTYPES, OpenedBase, open_base

if TYPE_CHECKING:
    from trainer.recipe import BaseModelConfig

NAMED_TOKENS = ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id")


def load_base(base: "BaseModelConfig", device: torch.device | str) -> PreTrainedModel:
    """Opens a base and loads it whole on one device, for one process without an engine."""
    return load_opened(open_base(base), Unsharded(device))


def load_opened(
    opened: OpenedBase, shards: ShardingStrategy, progress: Callable[[int], None] = lambda _: None
) -> PreTrainedModel:
    """The base model, frozen and in eval mode; its NF4 linears are `NF4Linear`. Uses `opened.model` up.

    Of every parameter just the run that `shards` keeps on this rank; buffers and NF4's second level are whole on
    `shards.device`. With the sharding of a process group (Zero3Sharding) every rank calls this together.
    `progress` receives the bytes read so far after each tensor; `bytes_to_read` is about their total.
    """
    model = opened.model
    if opened.base.quantization == "nf4":
        pack_linears(model, DTYPES[opened.base.dtype])
    for source, target in opened.names.items():
        fill(model, target, opened.weights, source, shards)
        progress(opened.weights.bytes_read)
    tie(model)
    set_generation(model, opened.weights.folder)
    move_buffers(model, shards.device)
    model.requires_grad_(False)
    _assert_nothing_on_meta(model)
    return model.eval()


def bytes_to_read(opened: OpenedBase, world: int) -> int:
    """Bytes of the files that each of `world` ranks reads, not counting ends of rows and blocks that two ranks read."""
    return sum(map(opened.weights.nbytes, opened.names)) // world


def pack_linears(model: PreTrainedModel, compute_dtype: torch.dtype) -> None:
    """Replaces every nn.Linear except the output embedding by an empty NF4Linear."""
    head = model.get_output_embeddings()
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and module is not head:
            bias = module.bias is not None
            model.set_submodule(name, NF4Linear(module.in_features, module.out_features, bias, compute_dtype))


def tie(model: PreTrainedModel) -> None:
    """Makes tied parameters one object again: assigning new ones has untied them."""
    for target, source in model.all_tied_weights_keys.items():
        loaded, other = (target, source) if model.get_parameter(source).is_meta else (source, target)
        owner, _, attribute = other.rpartition(".")
        setattr(model.get_submodule(owner), attribute, model.get_parameter(loaded))


def set_generation(model: PreTrainedModel, folder: Path) -> None:
    """Takes over only the special tokens of the folder's generation config, if it has one, and turns the cache off.

    Its penalties and temperatures are left out, since with them greedy decoding would not give the likeliest answer.
    Generation still uses a cache; a plain forward does not, because transformers isolates packed documents by
    position_ids only while no cache is in use.
    """
    if (folder / "generation_config.json").is_file():
        named = GenerationConfig.from_pretrained(folder)  # nosec B615 # a local folder
        model.generation_config = GenerationConfig(**{key: getattr(named, key) for key in NAMED_TOKENS})
    model.config.use_cache = False
    model.generation_config.use_cache = True


def move_buffers(model: PreTrainedModel, device: torch.device) -> None:
    """Moves buffers to the device; parameters are already where they belong."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = buffer.to(device)


def _assert_nothing_on_meta(model: PreTrainedModel) -> None:
    left = [name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta]
    assert not left, f"left on meta: {left}"
