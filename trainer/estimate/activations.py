"""Measures what one micro-batch keeps for backward by running a copy with few layers on fake tensors: fast, no memory.

Autograd itself reports what it saves for the model code that trains, adapters included. A model of L layers keeps what
one layer keeps plus L - 1 times what a second one adds. Layers of different kinds count as the mean of their kinds.
"""

import copy
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from transformers import PretrainedConfig
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from trainer.base.nf4 import BLOCKS_OF_BLOCKS, NF4Linear, SecondLevel
from trainer.base.weight_map import DTYPES
from trainer.estimate.rank_model import base_of, build_rank_model, decoder_layers, groups_without_ranks
from trainer.recipe import TAKE_LENGTHS, Checkpointing, ExpertsConfig, Recipe

# Layers whose inputs DeepSpeed's offload still has on the device: the newest one and up to two on their way.
NOT_YET_OFFLOADED = 3
FLASH = "fa2_on_fake_tensors"  # stands in for flash_attention_2 and varlen, which only run on a GPU


@dataclass(frozen=True)
class Activations:
    """Bytes that one micro-batch keeps for backward on its way through the decoder.

    first: of the first `kinds` layers and of what belongs to no layer (final norm) or to all (rotary tables). The
    embedding is frozen, so the first layer keeps less than the others. layer: of each further layer. hidden: of one
    layer's input [micro batch, seq, hidden], which is all that checkpointing keeps per layer. shared: of the other
    arguments that all layers get (attention masks, rotary tables), which checkpointing keeps until the first layer is
    recomputed.
    """

    first: int
    layer: int
    hidden: int
    shared: int
    layers: int
    kinds: int

    def saved(self, checkpointing: Checkpointing) -> int:
        """Device bytes kept when forward ends, all of them until backward begins."""
        if not checkpointing:
            return self.first + (self.layers - self.kinds) * self.layer
        layers = min(self.layers, NOT_YET_OFFLOADED) if checkpointing == "offload" else self.layers
        return layers * self.hidden + self.shared

    def offloaded(self, checkpointing: Checkpointing) -> int:
        """Host bytes of buffers for all layers' inputs except the last, which never leaves the device."""
        return (self.layers - 1) * self.hidden if checkpointing == "offload" else 0


def estimate_activations(config: PretrainedConfig, recipe: Recipe) -> Activations:
    """Estimates a micro-batch of train.micro_batch_size rows of data.seq_len tokens, without the head and the loss."""
    text = config.get_text_config()
    kinds = len(dict.fromkeys(getattr(text, "layer_types", None) or [])) or 1
    short, long = (_saved_bytes(_shortened(config, kinds * times), recipe) for times in (1, 2))
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    hidden = tokens * text.hidden_size * DTYPES[recipe.base.dtype].itemsize
    return Activations(
        first=short.own + long.of_shared,
        layer=(long.own - short.own) // kinds,
        hidden=hidden,
        shared=long.shared,
        layers=text.num_hidden_layers,
        kinds=kinds,
    )


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with `layers` layers, of which each kind of layer has the same number."""
    short = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(short, "layer_types", None) or []))
    short.num_hidden_layers = layers
    if kinds:
        short.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    return short


@dataclass(frozen=True)
class _SavedBytes:
    """own, of_shared: bytes that autograd saves, apart from and of what all layers share. shared: all of the latter."""

    own: int
    of_shared: int
    shared: int


def _saved_bytes(config: PretrainedConfig, recipe: Recipe) -> _SavedBytes:
    """Runs the decoder's forward and counts what autograd saves besides parameters.

    Rows hold packed documents: fake positions could restart anywhere, so transformers builds attention masks.
    """
    adapter = recipe.adapter.model_copy(update={"balance_loss_weight": 0.0})  # needs a training loop, saves nothing
    base = recipe.base.model_copy(update={"attention": FLASH} if recipe.base.attention in TAKE_LENGTHS else {})
    experts = ExpertsConfig.model_validate({})  # not placed
    unplaced = recipe.model_copy(update={"experts": experts, "adapter": adapter, "base": base})
    kept: dict[int, Any] = {}
    shared: dict[int, Any] = {}
    rows, length = recipe.train.micro_batch_size, recipe.data.seq_len
    with _flash_attention():
        model = build_rank_model(config, unplaced, groups_without_ranks(experts, 1, 1), by_layer=False).model
        model.train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            for layer in decoder_layers(model):
                layer.register_forward_pre_hook(_argument_hook(_collector(shared, own)), with_kwargs=True)
            ids, positions = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
            decoder = base_of(model).get_decoder()
            with saved_tensors_hooks(_collector(kept, own), lambda tensor: tensor):
                hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False)
            del hidden
    both = kept.keys() & shared.keys()
    return _SavedBytes(_bytes(kept, kept.keys() - both), _bytes(kept, both), _bytes(shared, shared.keys()))


def _argument_hook(collect: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A forward pre-hook that collects a layer's arguments other than its input."""

    def hook(_layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        for each in tree_leaves((positional[1:], named)):
            if torch.is_tensor(each):
                collect(each)

    return hook


def _collector(kept: dict[int, Any], own: set[int]) -> Callable[[Tensor], Tensor]:
    """A function that adds a tensor's storage to `kept` unless it is in `own`, and returns the tensor."""

    def collect(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # referenced, so that its address is not reused
        return tensor

    return collect


def _bytes(storages: dict[int, Any], which: Iterable[int]) -> int:
    return sum(storages[key].nbytes() for key in which)


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Registers FLASH as an attention implementation; transformers builds no mask for it."""
    ALL_ATTENTION_FUNCTIONS[FLASH] = lambda _, q, k, v, *_mask, **_options: (_Flash.apply(q, k, v), None)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[FLASH]


class _Flash(torch.autograd.Function):
    """Saves what flash-attn's kernels save: q, k and v without repeated keys, the output, each row's log-sum-exp."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [rows, heads, seq, d]; k, v: [rows, key/value heads, seq, d]; returns [rows, seq, heads, d]."""
        rows, heads, length, _ = q.shape
        out = v.new_empty(rows, length, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, length, dtype=torch.float32))
        return out


def _make_fake(model: nn.Module) -> None:
    """Makes all parameters, buffers and second quantisation levels fake CPU tensors; call under FakeTensorMode."""
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, NF4Linear):
            blocks = module.absmax.numel()
            module.second = SecondLevel(torch.empty(-(-blocks // BLOCKS_OF_BLOCKS)), torch.empty(256), torch.empty(()))
