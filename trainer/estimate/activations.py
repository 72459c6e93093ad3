"""What one micro-batch keeps for backward, found by running a copy of few layers on fake tensors: no memory, no time.

Autograd itself tells what it saves, of the same model code that trains, adapters included; a model of L layers keeps
what one keeps, and L - 1 times what a second adds. Layers of different kinds are counted as the mean of their kinds.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from transformers import PretrainedConfig

from trainer.base.match import DTYPES
from trainer.base.nf4 import BLOCKS_OF_BLOCKS, NF4Linear, SecondLevel
from trainer.estimate.model import build_rank_model
from trainer.recipe import ExpertsConfig, Recipe


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward by one micro-batch on its way through the decoder.

    first: of the first `kinds` layers and of what is in no layer (final norm). The embedding is frozen, so the first
    layer keeps less than the others. layer: of each further one. hidden: of one layer's input [micro batch, seq,
    hidden], all that checkpointing keeps of a layer.
    """

    first: int
    layer: int
    hidden: int
    layers: int
    kinds: int

    def saved(self, checkpointing: bool) -> int:
        """From forward on, until backward comes by."""
        if checkpointing:
            return self.layers * self.hidden
        return self.first + (self.layers - self.kinds) * self.layer


def activations(config: PretrainedConfig, recipe: Recipe) -> Activations:
    """For rows of data.seq_len tokens and train.micro_batch_size of them; the head and the loss are not included."""
    text = config.get_text_config()
    kinds = len(dict.fromkeys(getattr(text, "layer_types", None) or [])) or 1
    few, more = (_saved(_shortened(config, kinds * times), recipe) for times in (1, 2))
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    hidden = tokens * text.hidden_size * DTYPES[recipe.base.dtype].itemsize
    return Activations(few, (more - few) // kinds, hidden, text.num_hidden_layers, kinds)


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with so many layers, in which every kind of layer stands equally often."""
    short = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(short, "layer_types", None) or []))
    short.num_hidden_layers = layers
    if kinds:
        short.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    return short


def _saved(config: PretrainedConfig, recipe: Recipe) -> int:
    """Bytes that autograd saves in the decoder's forward, parameters left out."""
    adapter = recipe.adapter.model_copy(update={"balance_loss_weight": 0.0})  # which wants a loop, and saves nothing
    alone = recipe.model_copy(update={"experts": ExpertsConfig(), "adapter": adapter})
    model = build_rank_model(config, alone, world_size=1).model.train()
    kept: dict[int, Any] = {}
    rows, length = recipe.train.micro_batch_size, recipe.data.seq_len
    with FakeTensorMode(allow_non_fake_inputs=True):
        _make_fake(model)
        own = {p.untyped_storage()._cdata for p in model.parameters()}
        ids = torch.zeros(rows, length, dtype=torch.long)
        decoder = model.get_base_model().get_decoder()
        with saved_tensors_hooks(_collector(kept, own), lambda tensor: tensor):
            hidden = decoder(input_ids=ids, attention_mask=_mask(recipe, rows, length), use_cache=False)
        del hidden
    return sum(storage.nbytes() for storage in kept.values())


def _mask(recipe: Recipe, rows: int, length: int) -> Tensor | None:
    """What keeps packed documents apart, [rows, 1, length, length]; flash_attention_2 has no need of it."""
    if recipe.base.attention == "flash_attention_2":
        return None
    dtype = torch.bool if recipe.base.attention == "sdpa" else DTYPES[recipe.base.dtype]
    return torch.zeros(rows, 1, length, length, dtype=dtype)


def _collector(kept: dict[int, Any], own: set[int]) -> Callable[[Tensor], Tensor]:
    def collect(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place in memory
        return tensor

    return collect


def _make_fake(model: nn.Module) -> None:
    """Parameters and buffers on a CPU that is not there, second levels as well."""
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, NF4Linear):
            blocks = module.absmax.numel()
            module.second = SecondLevel(torch.empty(-(-blocks // BLOCKS_OF_BLOCKS)), torch.empty(256), torch.empty(()))
