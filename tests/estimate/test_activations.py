"""What is said to be kept for backward is what a real model keeps, on real rows of packed documents."""

import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks

from tests.distributed import scene
from tests.tiny_models import tiny_llama, tiny_model
from trainer.adapters.attach import attach_adapter
from trainer.base.load import load_base
from trainer.base.source import parse_config_alone
from trainer.estimate.activations import activations

ROWS, LENGTH = 2, 48


def kept_by_a_real_forward(recipe):
    model = attach_adapter(load_base(recipe.base, "cpu"), recipe.adapter).train()
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    storages = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            storages[storage.data_ptr()] = storage
        return tensor

    positions = torch.arange(LENGTH) % (LENGTH // 2)  # two documents a row
    ids = torch.arange(ROWS * LENGTH).view(ROWS, LENGTH)
    with saved_tensors_hooks(pack, lambda tensor: tensor):
        model.get_base_model().get_decoder()(input_ids=ids, position_ids=positions.expand(ROWS, -1), use_cache=False)
    return sum(storage.nbytes() for storage in storages.values())


@pytest.mark.parametrize("quantization", ["nf4", "none"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_llama_of_five_layers(tmp_path, quantization, attention, dtype):
    folder = tiny_llama(tmp_path, num_hidden_layers=5)
    check(folder, base__quantization=quantization, base__attention=attention, base__dtype=dtype)


@pytest.mark.parametrize("family", ["qwen3", "gemma3_text", "phi3", "olmo2"])
def test_other_families(tmp_path, family):
    targets = ["down_proj"] if family == "phi3" else ["q_proj", "down_proj"]
    check(tiny_model(tmp_path, family), adapter__target_modules=targets)


def check(folder, **changes):
    recipe = scene.recipe(
        folder, data__seq_len=LENGTH, train__micro_batch_size=ROWS, train__global_batch_size=ROWS, **changes
    )
    estimated = activations(parse_config_alone(recipe.base), recipe).saved(checkpointing=False)
    assert estimated == pytest.approx(kept_by_a_real_forward(recipe), rel=0.02)
