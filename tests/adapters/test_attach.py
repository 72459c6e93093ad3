"""The adapter that a recipe describes: attached, refused, continued from a folder, and published."""

import json
from dataclasses import fields
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftConfig, PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from data_prep.user_error import UserError
from tests.adapters.reference import off
from tests.support.tiny_adapters import TOKENS, logits, plain_model, wake
from tests.support.tiny_models import tiny_llama
from trainer.adapters import EXPERT_METHODS
from trainer.adapters.adapter_folder import COMMON_KEYS, drop_default_keys, load_adapter, save_adapter
from trainer.adapters.attach import attach_adapter, check_adapter, peft_config
from trainer.adapters.layer import Experts
from trainer.recipe import AdapterConfig

SIZES = {
    "teamlora": {"num_experts": 2, "expert_rank": 3},
    "moelora": {"num_experts": 2, "expert_rank": 3},
    "hydralora": {"num_experts": 2, "expert_rank": 3},
    "lora": {"total_rank": 6},
}
methods = pytest.mark.parametrize("method", SIZES)


def section(method: str = "teamlora", **keys: object) -> AdapterConfig:
    return AdapterConfig(**{"method": method, "alpha": 6.0, **SIZES[method], **keys})


def learning(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}


def trained(folder: Path, adapter: AdapterConfig) -> PeftModel:
    """An adapted model whose adapter has learned something."""
    model = attach_adapter(plain_model(folder, torch.bfloat16), adapter)
    wake(model)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_()
    return model


def saved(folder: Path, llama: Path, adapter: AdapterConfig) -> Path:
    model = trained(llama, adapter)
    save_adapter(model, learning(model), folder)
    return folder


def refused(model: nn.Module, adapter: AdapterConfig, text: str) -> None:
    with pytest.raises(UserError, match=text) as caught:
        check_adapter(model, adapter)
    assert "\n" not in str(caught.value)


@methods
def test_the_adapter_is_all_that_learns_and_has_the_dtype_of_its_base(llama, method):
    model = attach_adapter(plain_model(llama, torch.bfloat16), section(method, target_modules=["q_proj", "up_proj"]))
    values = learning(model)
    assert {value.dtype for value in values.values()} == {torch.bfloat16}
    assert all("lora" in name and (".q_proj." in name or ".up_proj." in name) for name in values)
    assert sum(name.endswith(("lora_a", "lora_A.default.weight")) for name in values) == 2 * 2


def test_the_recipe_reaches_every_adapter(llama):
    keys = {"dropout": 0.25, "balance_loss_weight": 0.5, "renormalize": True}
    model = attach_adapter(plain_model(llama), section(**keys))
    for module in (m for m in model.modules() if isinstance(m, Experts)):
        assert module.experts.shape[:2] == (2, 3)
        assert (module.dropout, module.balance_loss_weight) == (0.25, 0.5)
        assert (module.gate.scale, module.gate.renormalize) == (6.0 / 3 * 2, True)


@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_pefts_configuration_has_the_defaults_of_the_recipe(method):
    config, _ = EXPERT_METHODS[method]
    own, recipes = config(), peft_config(AdapterConfig(method=method))
    assert (own.num_experts, own.expert_rank, own.total_rank, own.alpha) == (4, 16, 64, 32.0)
    assert own.target_modules == ["gate_proj", "up_proj", "down_proj"]
    assert {**recipes.to_dict(), "task_type": None} == own.to_dict()
    assert config().target_modules is not own.target_modules


@pytest.mark.parametrize("method", EXPERT_METHODS)
def test_a_saved_configuration_states_every_default(tmp_path, method):
    """So that adapters on disk stay what they are when a default changes."""
    config, _ = EXPERT_METHODS[method]
    config(expert_rank=8, alpha=16.0).save_pretrained(tmp_path)
    stored = json.loads((tmp_path / "adapter_config.json").read_text())
    assert stored.keys() >= {field.name for field in fields(config)}
    loaded = PeftConfig.from_pretrained(tmp_path)
    assert type(loaded) is config
    assert (loaded.expert_rank, loaded.alpha) == (8, 16.0)


def test_a_saved_lora_states_only_what_every_reader_knows(tmp_path, llama):
    """Older PEFT refuses keys that it does not know."""
    folder = saved(tmp_path / "adapter", llama, section("lora"))
    assert json.loads((folder / "adapter_config.json").read_text()) == {
        "base_model_name_or_path": str(llama),
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": section("lora").alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": section("lora").total_rank,
        "target_modules": ["down_proj", "gate_proj", "up_proj"],
        "task_type": "CAUSAL_LM",
    }


@pytest.mark.parametrize(
    "settings",
    [
        {"use_rslora": True},
        {"use_dora": True},
        {"rank_pattern": {"up_proj": 2}, "alpha_pattern": {"up_proj": 4}},
        {"layers_to_transform": [0], "layers_pattern": "layers"},
        {"exclude_modules": ["down_proj"]},
        {"key_of_a_later_version": 1},
    ],
)
def test_settings_that_differ_from_their_defaults_stay(tmp_path, settings):
    LoraConfig(r=2, target_modules=["up_proj"], task_type="CAUSAL_LM").save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    common = {"r": 2, "lora_alpha": 8, "target_modules": ["up_proj"], "peft_type": "LORA", "bias": "none"}
    path.write_text(json.dumps({**json.loads(path.read_text()), **settings, "peft_version": "0.15.0"}))
    drop_default_keys(tmp_path)
    found = json.loads(path.read_text())
    assert found.items() >= {**common, **settings}.items()
    assert found.keys() == COMMON_KEYS | settings.keys()


def test_target_that_the_model_does_not_have_is_refused_with_those_that_it_has(llama):
    linears = "down_proj, gate_proj, k_proj, o_proj, q_proj, up_proj, v_proj"
    for target in ("fc1", "proj", "lm_head", "embed_tokens"):
        text = rf"^adapter\.target_modules: '{target}' matches no linear layer of llama; it has {linears}$"
        refused(plain_model(llama), section(target_modules=["up_proj", target]), text)


@methods
def test_check_passes_what_fits(tmp_path, llama, method):
    check_adapter(plain_model(llama), section(method))
    check_adapter(plain_model(llama), section(method, init_from=saved(tmp_path / "adapter", llama, section(method))))


@methods
def test_init_from_continues_from_the_saved_values_and_learns(tmp_path, llama, method):
    before = trained(llama, section(method))
    save_adapter(before, learning(before), tmp_path / "adapter")
    model = attach_adapter(plain_model(llama, torch.bfloat16), section(method, init_from=tmp_path / "adapter"))
    values = learning(model)
    assert values.keys() == learning(before).keys()
    assert all(torch.equal(values[name], value) for name, value in learning(before).items())
    assert torch.equal(logits(model), logits(before))


@methods
def test_an_adapter_that_lacks_a_part_is_refused_and_the_part_named(tmp_path, llama, method):
    folder = saved(tmp_path / "adapter", llama, section(method))
    whole = load_file(folder / "adapter_model.safetensors")
    lost = next(iter(whole))
    save_file({name: tensor for name, tensor in whole.items() if name != lost}, folder / "adapter_model.safetensors")
    module = ".".join(lost.split(".")[3:6])
    with pytest.raises(
        UserError, match=rf"^{folder}: parts of the adapter are missing \(.*{module}.*give a complete one$"
    ):
        attach_adapter(plain_model(llama), section(method, init_from=folder))


def test_dropout_and_balance_loss_come_from_the_recipe_when_training_goes_on(tmp_path, llama):
    folder = saved(tmp_path / "adapter", llama, section(dropout=0.1))
    model = attach_adapter(plain_model(llama), section(init_from=folder, dropout=0.5, balance_loss_weight=0.25))
    settings = {(m.dropout, m.balance_loss_weight) for m in model.modules() if isinstance(m, Experts)}
    assert settings == {(0.5, 0.25)}
    lora = saved(tmp_path / "lora", llama, section("lora"))
    model = attach_adapter(plain_model(llama), section("lora", init_from=lora, dropout=0.5))
    assert model.peft_config["default"].lora_dropout == 0.5


@pytest.mark.parametrize(
    ("adapter", "text"),
    [
        (section("moelora"), "holds a TEAMLORA adapter, but adapter.method=moelora"),
        (section("lora"), "holds a TEAMLORA adapter, but adapter.method=lora"),
        (section(num_experts=3), "has num_experts=2, but adapter.num_experts=3"),
        (section(expert_rank=4), "has expert_rank=3, but adapter.expert_rank=4"),
        (section(alpha=8.0), "has alpha=6.0, but adapter.alpha=8.0"),
        (section(renormalize=True), "has renormalize=False, but adapter.renormalize=True"),
        (
            section(target_modules=["up_proj"]),
            "adapts down_proj, gate_proj, up_proj, but adapter.target_modules=up_proj",
        ),
    ],
)
def test_init_from_of_another_shape_is_refused_with_both_values(tmp_path, llama, adapter, text):
    folder = saved(tmp_path / "adapter", llama, section())
    adapter = adapter.model_copy(update={"init_from": folder})
    refused(plain_model(llama), adapter, rf"^adapter\.init_from: {folder} {text}; make them agree$")


@pytest.mark.parametrize(
    ("adapter", "text"),
    [(section("lora", total_rank=8), "total_rank=6, but adapter.total_rank=8"),
     (section("lora", alpha=1.0), "alpha=6.0, but adapter.alpha=1.0")],
)  # fmt: skip
def test_init_from_of_another_lora_is_refused_with_both_values(tmp_path, llama, adapter, text):
    folder = saved(tmp_path / "adapter", llama, section("lora"))
    refused(plain_model(llama), adapter.model_copy(update={"init_from": folder}), text)


@pytest.mark.parametrize(
    ("settings", "text"),
    [({"use_rslora": True}, "has use_rslora=True, which no recipe describes; merge that adapter into its base"),
     ({"modules_to_save": ["lm_head"]}, r"has modules_to_save=\['lm_head'\], which no recipe describes"),
     ({"rank_pattern": {"up_proj": 2}}, r"has rank_pattern=\{'up_proj': 2\}, which no recipe describes"),
     ({"target_modules": ".*_proj"}, r"adapts '\.\*_proj', but adapter\.target_modules=gate_proj, up_proj, down_proj")],
)  # fmt: skip
def test_init_from_of_what_no_recipe_describes_is_refused(tmp_path, llama, settings, text):
    folder = saved(tmp_path / "adapter", llama, section("lora"))
    config = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps({**config, **settings}))
    refused(plain_model(llama), section("lora", init_from=folder), text)


@methods
def test_an_adapter_of_another_base_is_refused_in_one_line(tmp_path, llama, method):
    folder = saved(tmp_path / "adapter", llama, section(method))
    shallow, wide = (tiny_llama(tmp_path / name) for name in ("shallow", "wide"))
    for base, changes in ((shallow, {"num_hidden_layers": 1}), (wide, {"hidden_size": 32})):
        config = AutoConfig.from_pretrained(base, **changes)
        with pytest.raises(UserError) as caught:
            load_adapter(AutoModelForCausalLM.from_config(config), folder)
        told = (
            "have no place in an adapter of this base, first base_model" if base == shallow else "does not fit the base"
        )
        assert told in str(caught.value)
        assert "\n" not in str(caught.value)


def test_an_adapter_that_would_write_into_the_base_is_refused(tmp_path, llama):
    folder = saved(tmp_path / "adapter", llama, section("lora"))
    weights = folder / "adapter_model.safetensors"
    embedding = {"base_model.model.model.embed_tokens.weight": plain_model(llama).model.embed_tokens.weight + 1}
    save_file({**load_file(weights), **embedding}, weights)
    with pytest.raises(UserError, match=r"^.*: 1 tensors have no place .*first base_model\.model\.model\.embed_tokens"):
        load_adapter(plain_model(llama), folder)


def test_init_from_without_an_adapter_is_refused(tmp_path, llama):
    refused(
        plain_model(llama),
        section(init_from=tmp_path),
        rf"^adapter\.init_from: {tmp_path} holds no adapter that PEFT can read .*give the adapter/ folder of a run$",
    )


@methods
def test_published_folder_loads_in_plain_peft(tmp_path, llama, method):
    model = trained(llama, section(method))
    save_adapter(model, learning(model), tmp_path / "adapter")
    loaded = PeftModel.from_pretrained(plain_model(llama, torch.bfloat16), tmp_path / "adapter")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    assert off(logits(loaded), logits(model)) <= 2e-2  # an fp32 adapter from here on
    assert loaded(input_ids=TOKENS).logits.dtype == torch.bfloat16


def test_nothing_is_published_when_writing_breaks_off(tmp_path, llama, monkeypatch):
    model, folder = trained(llama, section()), tmp_path / "adapter"

    def full_disk(*args: object, **kwargs: object) -> None:
        raise OSError("no space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("peft.peft_model.safe_save_file", full_disk)
        with pytest.raises(OSError, match="no space left"):
            save_adapter(model, learning(model), folder)
    assert not any(tmp_path.iterdir())
    save_adapter(model, learning(model), folder)
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@pytest.mark.parametrize(
    ("damage", "text"),
    [
        (lambda parameters: parameters.popitem(), "tensors were written of"),
        (lambda parameters: parameters.update({next(iter(parameters)): torch.zeros(0)}), "was not written as it is"),
    ],
    ids=["a tensor is missing", "a tensor is empty, as under ZeRO-3"],
)
def test_nothing_is_published_when_other_values_were_written(tmp_path, llama, monkeypatch, damage, text):
    model, folder = trained(llama, section()), tmp_path / "adapter"
    save_pretrained = model.save_pretrained

    def damaged(path: str, state_dict: dict, **kwargs: object) -> None:
        written = dict(state_dict)
        damage(written)
        save_pretrained(path, state_dict=written, **kwargs)

    monkeypatch.setattr(model, "save_pretrained", damaged)
    with pytest.raises(RuntimeError, match=text):
        save_adapter(model, learning(model), folder)
    assert not any(tmp_path.iterdir())
