"""What is saved loads again through plain PEFT, on each kind of base, and computes the loop on that base's linears."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel

from tests.adapters.reference import off, with_loops
from tests.support.tiny_adapters import METHODS, adapted, config_of, logits, plain_model, wake
from trainer.base.loader import load_base
from trainer.base.nf4 import NF4Linear
from trainer.recipe import BaseModelConfig


def plain_base(folder: Path) -> PreTrainedModel:
    return plain_model(folder, torch.bfloat16)


def bitsandbytes_base(folder: Path) -> PreTrainedModel:
    config = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.bfloat16,
    )
    return plain_model(folder, torch.bfloat16, quantization_config=config, device_map="cpu")


def own_base(folder: Path) -> PreTrainedModel:
    return load_base(BaseModelConfig(model=str(folder), quantization="nf4", dtype="bf16"), "cpu")


BASES = {
    "plain": (plain_base, nn.Linear),
    "bitsandbytes": (bitsandbytes_base, Linear4bit),
    "own": (own_base, NF4Linear),
}
methods = pytest.mark.parametrize("method", METHODS)


def adapter_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters() if "lora_experts." in name}


@pytest.mark.parametrize("autocast", [True, False], ids=["fp32 adapter", "adapter in the base's dtype"])
@pytest.mark.parametrize(("load", "linear"), BASES.values(), ids=BASES)
@methods
def test_round_trip_on_every_base(tmp_path, llama, method, load: Callable, linear: type, autocast: bool):
    config = config_of(method)
    # In eval() bitsandbytes repacks its weights at the first forward on CPUs with AVX512-BF16, and then computes
    # with another kernel: everything here stays in training mode, where the loop meets the very same linear.
    trained = get_peft_model(load(llama), config, autocast_adapter_dtype=autocast).train()
    with trained.disable_adapter():
        base = logits(trained)
    wake(trained)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(load(llama), tmp_path, autocast_adapter_dtype=autocast).train()
    saved, found = adapter_of(trained), adapter_of(loaded)
    assert {p.dtype for p in found.values()} == {torch.float32 if autocast else torch.bfloat16}
    assert saved.keys() == found.keys()
    assert all(torch.equal(saved[name], found[name]) for name in saved)
    assert type(loaded.get_submodule("base_model.model.model.layers.1.mlp.up_proj.base_layer")) is linear
    value = logits(loaded)
    assert torch.equal(value, logits(trained))
    assert off(base, value) > 0.2
    # an fp32 adapter rounds where the loop does; a bf16 one at every step on the way
    assert off(value, logits(with_loops(loaded, config))) <= (5e-3 if autocast else 3e-2)


@methods
def test_on_our_nf4_base_in_fp32_the_adapter_is_the_loop_in_both_modes(llama, method):
    base = load_base(BaseModelConfig(model=str(llama), quantization="nf4", dtype="fp32"), "cpu")
    model = get_peft_model(base, config_of(method))
    wake(model)
    value = logits(model.train())
    assert torch.equal(logits(model.eval()), value)
    assert off(value, logits(with_loops(model, config_of(method)))) <= 1e-5


@methods
def test_saved_values_load_in_either_dtype(tmp_path, llama, method):
    trained = adapted(llama, method, torch.bfloat16)
    trained.save_pretrained(tmp_path)
    saved = adapter_of(trained)
    for autocast, dtype in ((False, torch.bfloat16), (True, torch.float32)):
        base = plain_model(llama, torch.bfloat16)
        found = adapter_of(PeftModel.from_pretrained(base, tmp_path, autocast_adapter_dtype=autocast))
        assert {p.dtype for p in found.values()} == {dtype}
        assert all(torch.equal(saved[name].bfloat16(), found[name].bfloat16()) for name in saved)


@methods
def test_loads_without_fresh_values_in_between(tmp_path, llama, method):
    trained = adapted(llama, method)
    trained.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain_model(llama), tmp_path, low_cpu_mem_usage=True)
    assert torch.equal(logits(loaded), logits(trained))


@methods
def test_every_setting_comes_back(tmp_path, llama, method):
    options = {"dropout": 0.1, "balance_loss_weight": 0.01, "target_modules": ["q_proj"], "layers_to_transform": [1]}
    config = config_of(method, **options, **({"renormalize": True} if method == "teamlora" else {}))
    get_peft_model(plain_model(llama), config).save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(plain_model(llama), tmp_path).peft_config["default"]
    for setting in ("num_experts", "expert_rank", "alpha", "renormalize", *options):
        assert getattr(loaded, setting, None) == getattr(config, setting, None), setting
    assert type(loaded) is METHODS[method]


@methods
def test_a_second_adapter_loads_beside_the_first(tmp_path, llama, method):
    other = adapted(llama, method, num_experts=2)
    other.save_pretrained(tmp_path)
    model = adapted(llama, method)
    first = logits(model)
    model.load_adapter(tmp_path, "other")
    assert torch.equal(logits(model), first)
    model.set_adapter("other")
    assert torch.equal(logits(model), logits(other))


def test_modules_saved_whole_come_back_with_the_adapter(tmp_path, llama):
    trained = adapted(llama, "teamlora", modules_to_save=["lm_head"])
    with torch.no_grad():
        trained.base_model.model.lm_head.modules_to_save["default"].weight.mul_(2)
    trained.save_pretrained(tmp_path)
    assert torch.equal(logits(PeftModel.from_pretrained(plain_model(llama), tmp_path)), logits(trained))
