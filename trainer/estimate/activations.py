"""What one micro-batch keeps for backward, found by running a copy of few layers on fake tensors: no memory, no time.

Autograd itself tells what it saves, of the same model code that trains, adapters included; a model of L layers keeps
what one keeps, and L - 1 times what a second adds. Layers of different kinds are counted as the mean of their kinds.
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
from trainer.estimate.gathered import decoder_layers
from trainer.estimate.rank_model import build_rank_model
from trainer.recipe import ExpertsConfig, Recipe

FLASH = "fa2_on_fake_tensors"  # stands for flash_attention_2, which only a GPU can run


@dataclass(frozen=True)
class Activations:
    """Bytes kept for backward by one micro-batch on its way through the decoder.

    first: of the first `kinds` layers and of what is in no layer (final norm) or in all (rotary tables). The embedding
    is frozen, so the first layer keeps less than the others. layer: of each further one. hidden: of one layer's input
    [micro batch, seq, hidden], all that checkpointing keeps of a layer. shared: of what all layers are given beside it
    (attention masks, rotary tables), which checkpointing keeps until the first layer is recomputed.
    """

    first: int
    layer: int
    hidden: int
    shared: int
    layers: int
    kinds: int

    def saved(self, checkpointing: bool) -> int:
        """From forward on, until backward comes by."""
        if checkpointing:
            return self.layers * self.hidden + self.shared
        return self.first + (self.layers - self.kinds) * self.layer


def activations(config: PretrainedConfig, recipe: Recipe) -> Activations:
    """For rows of data.seq_len tokens and train.micro_batch_size of them; the head and the loss are not included."""
    text = config.get_text_config()
    kinds = len(dict.fromkeys(getattr(text, "layer_types", None) or [])) or 1
    few, more = (_saved(_shortened(config, kinds * times), recipe) for times in (1, 2))
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    hidden = tokens * text.hidden_size * DTYPES[recipe.base.dtype].itemsize
    return Activations(
        first=few.own + more.of_shared,
        layer=(more.own - few.own) // kinds,
        hidden=hidden,
        shared=more.shared,
        layers=text.num_hidden_layers,
        kinds=kinds,
    )


def _shortened(config: PretrainedConfig, layers: int) -> PretrainedConfig:
    """The same model with so many layers, in which every kind of layer stands equally often."""
    short = copy.deepcopy(config)
    kinds = list(dict.fromkeys(getattr(short, "layer_types", None) or []))
    short.num_hidden_layers = layers
    if kinds:
        short.layer_types = [kinds[i % len(kinds)] for i in range(layers)]
    return short


@dataclass(frozen=True)
class _Saved:
    """Bytes that autograd saves, without and of what all layers share (`of_shared`); shared: of that, saved or not."""

    own: int
    of_shared: int
    shared: int


def _saved(config: PretrainedConfig, recipe: Recipe) -> _Saved:
    """What autograd saves in the decoder's forward, parameters left out.

    Rows are of packed documents: positions that are not known could begin anew anywhere, and transformers makes masks.
    """
    adapter = recipe.adapter.model_copy(update={"balance_loss_weight": 0.0})  # which wants a loop, and saves nothing
    base = recipe.base.model_copy(update={"attention": FLASH} if recipe.base.attention == "flash_attention_2" else {})
    alone = recipe.model_copy(update={"experts": ExpertsConfig(), "adapter": adapter, "base": base})
    kept: dict[int, Any] = {}
    shared: dict[int, Any] = {}
    rows, length = recipe.train.micro_batch_size, recipe.data.seq_len
    with _flash_attention():
        model = build_rank_model(config, alone, world_size=1).model.train()
        with FakeTensorMode(allow_non_fake_inputs=True):
            _make_fake(model)
            own = {p.untyped_storage()._cdata for p in model.parameters()}
            for layer in decoder_layers(model):
                layer.register_forward_pre_hook(_watcher(_collector(shared, own)), with_kwargs=True)
            ids, positions = (torch.zeros(rows, length, dtype=torch.long) for _ in range(2))
            decoder = model.get_base_model().get_decoder()
            with saved_tensors_hooks(_collector(kept, own), lambda tensor: tensor):
                hidden = decoder(input_ids=ids, position_ids=positions, use_cache=False)
            del hidden
    both = kept.keys() & shared.keys()
    return _Saved(_bytes(kept, kept.keys() - both), _bytes(kept, both), _bytes(shared, shared.keys()))


def _watcher(collect: Callable[[Tensor], Tensor]) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any]], None]:
    """A hook before a layer's forward, which collects what the layer is given beside its input."""

    def watch(_layer: nn.Module, positional: tuple[Any, ...], named: dict[str, Any]) -> None:
        for each in tree_leaves((positional[1:], named)):
            if torch.is_tensor(each):
                collect(each)

    return watch


def _collector(kept: dict[int, Any], own: set[int]) -> Callable[[Tensor], Tensor]:
    def collect(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = storage  # held, so that no other takes its place in memory
        return tensor

    return collect


def _bytes(storages: dict[int, Any], which: Iterable[int]) -> int:
    return sum(storages[key].nbytes() for key in which)


@contextmanager
def _flash_attention() -> Iterator[None]:
    """Lets models be built with FLASH, for which transformers makes no mask."""
    ALL_ATTENTION_FUNCTIONS[FLASH] = lambda _, q, k, v, *_mask, **_options: (_Flash.apply(q, k, v), None)
    try:
        yield
    finally:
        del ALL_ATTENTION_FUNCTIONS[FLASH]


class _Flash(torch.autograd.Function):
    """Saves what flash-attn's kernels do: q, k and v, keys not repeated, the output, the log-sum-exp of each row."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q: [rows, heads, seq, d]; k, v: [rows, fewer heads, seq, d]; the output: [rows, seq, heads, d]."""
        rows, heads, length, _ = q.shape
        out = v.new_empty(rows, length, heads, v.shape[-1])
        ctx.save_for_backward(q, k, v, out, q.new_empty(rows, heads, length, dtype=torch.float32))
        return out


def _make_fake(model: nn.Module) -> None:
    """Parameters and buffers on a CPU that is not there, second levels as well."""
    model.to_empty(device="cpu")
    for module in model.modules():
        if isinstance(module, NF4Linear):
            blocks = module.absmax.numel()
            module.second = SecondLevel(torch.empty(-(-blocks // BLOCKS_OF_BLOCKS)), torch.empty(256), torch.empty(()))
