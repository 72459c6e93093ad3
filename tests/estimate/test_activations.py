"""The bytes estimated to be kept for backward are those that a real model keeps, on rows of packed documents."""

import gc
import weakref

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._pytree import tree_leaves

from tests.support import scene
from tests.support.tiny_models import tiny_llama, tiny_model
from trainer.adapters.attach import attach_adapter
from trainer.base.loader import load_base
from trainer.base.model_config import parse_config_alone
from trainer.estimate.activations import estimate_activations

ROWS, LENGTH = 2, 48


def bytes_kept_by_a_real_forward(recipe):
    model = attach_adapter(load_base(recipe.base, "cpu"), recipe.adapter).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().get_decoder()(**rows(), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_llama_with_five_layers(tmp_path, quantization, attention, dtype):
    folder = tiny_llama(tmp_path, num_hidden_layers=5)
    check(folder, base__quantization=quantization, base__attention=attention, base__dtype=dtype)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3", "olmo2"])
def test_other_families(tmp_path, family):
    targets = ["down_proj"] if family == "phi3" else ["q_proj", "down_proj"]
    check(tiny_model(tmp_path, family), adapter__target_modules=targets)


@pytest.mark.parametrize(
    ("family", "attention"), [("llama", "sdpa"), ("llama", "eager"), ("gemma3_text", "sdpa"), ("gemma3_text", "eager")]
)
def test_checkpointing_keeps_each_layers_input_and_what_all_layers_share(tmp_path, family, attention):
    recipe = recipe_for(tiny_model(tmp_path, family), base__attention=attention)
    model = attach_adapter(load_base(recipe.base, "cpu"), recipe.adapter).train()
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    arguments = []

    def remember(_layer, _positional, named):
        arguments.extend(weakref.ref(each) for each in tree_leaves(named) if torch.is_tensor(each))

    decoder = model.get_base_model().get_decoder()
    for layer in decoder.layers:
        layer.register_forward_pre_hook(remember, with_kwargs=True)
    hidden = decoder(**rows(), use_cache=False)
    gc.collect()
    storages = (tensor.untyped_storage() for each in arguments if (tensor := each()) is not None)
    alive = sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
    estimated = estimate_activations(parse_config_alone(recipe.base), recipe).saved(checkpointing=True)
    assert estimated == len(decoder.layers) * hidden.last_hidden_state.nbytes + alive


def test_flash_attention_keeps_neither_masks_nor_repeated_keys(recipe_of):
    """Llama-3-8B has 32 heads of 128 and 8 key/value heads; sdpa keeps a mask per layer in the compute dtype."""
    sizes = {}
    for attention, length in [("flash_attention_2", 64), ("flash_attention_2", 128), ("sdpa", 128)]:
        recipe = recipe_of("llama-3-8b", base__attention=attention, data__seq_len=length, train__global_batch_size=1)
        sizes[attention, length] = estimate_activations(parse_config_alone(recipe.base), recipe)
    short, flash, sdpa = sizes.values()
    assert flash.saved(False) == 2 * short.saved(False)
    assert flash.saved(True) == 2 * short.saved(True)
    assert sdpa.layer - flash.layer == 2 * (32 - 8) * 128 * 128 * 2 + 128 * 128 * 2


def rows():
    positions = torch.arange(LENGTH) % (LENGTH // 2)  # two documents per row
    return {"input_ids": torch.arange(ROWS * LENGTH).view(ROWS, LENGTH), "position_ids": positions.repeat(ROWS, 1)}


def recipe_for(folder, **changes):
    return scene.recipe(
        folder, data__seq_len=LENGTH, train__micro_batch_size=ROWS, train__global_batch_size=ROWS, **changes
    )


def check(folder, **changes):
    recipe = recipe_for(folder, **changes)
    estimated = estimate_activations(parse_config_alone(recipe.base), recipe).saved(checkpointing=False)
    assert estimated == pytest.approx(bytes_kept_by_a_real_forward(recipe), rel=0.02)
