"""The three methods in PEFT's hands: where they go, what they start from, how they are switched and refused."""

import re

import pytest
import torch
from peft import get_peft_model
from torch import Tensor, nn
from torch.nn import functional as F

from tests.adapters.reference import off, with_loops
from tests.support.tiny_adapters import METHODS, TOKENS, adapted, config_of, logits, make_experts, plain_model, wake
from trainer.adapters.layer import ExpertLayer, Experts, HydraLoraLayer, MoeLoraLayer, TeamLoraLayer

LAYERS = {"teamlora": TeamLoraLayer, "moelora": MoeLoraLayer, "hydralora": HydraLoraLayer}
methods = pytest.mark.parametrize("method", METHODS)


def layer_of(method: str, **options: object) -> ExpertLayer:
    layer = LAYERS[method](nn.Linear(20, 28), "default", config_of(method, **options))
    wake(layer)
    return layer


def adapted_linears(model: nn.Module) -> set[str]:
    names = (name for name, module in model.named_modules() if isinstance(module, ExpertLayer))
    return {re.sub(r".*layers\.", "", name) for name in names}


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_fresh_adapter_leaves_the_model_exactly_as_it_is(llama, method, dtype):
    base = plain_model(llama, dtype)
    before = logits(base)
    assert torch.equal(logits(get_peft_model(base, config_of(method))), before)


def test_m_starts_with_ones_on_the_diagonal_and_small_values_beside_it():
    interaction = Experts(20, 28, config_of("teamlora", num_experts=32)).interaction.detach()
    beside = interaction[~torch.eye(32, dtype=torch.bool)]
    assert torch.equal(interaction.diagonal(), torch.ones(32))
    assert beside.abs().max() <= 0.1
    assert beside.std() == pytest.approx(0.2 / 12**0.5, rel=0.1)  # of the uniform distribution


@methods
def test_adapted_model_computes_the_loop(llama, method):
    model = adapted(llama, method)
    value = logits(model)
    with model.disable_adapter():
        assert off(logits(model), value) > 0.1
    assert off(value, logits(with_loops(model, config_of(method)))) <= 1e-5


@methods
def test_only_the_adapter_learns(llama, method):
    model = adapted(llama, method)
    logits(model).sum().backward()
    learning = {name for name, p in model.named_parameters() if p.requires_grad}
    assert learning == {name for name, _ in model.named_parameters() if f".{method}_experts.default." in name}
    assert learning == {name for name, p in model.named_parameters() if p.grad is not None}


@methods
def test_layer_returns_a_tensor_of_the_base_dtype_and_modes_return_the_module(method):
    layer = layer_of(method).to(torch.bfloat16)
    for module in (layer, layer.adapters["default"]):
        assert module.train() is module
        assert module.eval() is module
    out = layer(torch.randn(2, 5, 20).bfloat16())
    assert isinstance(out, Tensor)
    assert (out.shape, out.dtype) == ((2, 5, 28), torch.bfloat16)


@methods
def test_adapted_model_generates(llama, method):
    model = adapted(llama, method).eval()
    out = model.generate(input_ids=TOKENS[:1], max_new_tokens=4, do_sample=False)
    for position in range(TOKENS.shape[1], out.shape[1]):
        assert out[0, position] == model(input_ids=out[:, :position]).logits[0, -1].argmax()


@methods
def test_dropout_acts_on_the_input_of_the_adapter_and_only_in_training(method):
    plain, dropping = make_experts(config_of(method)), make_experts(config_of(method, dropout=0.5))
    x, y = torch.randn(6, 20), torch.randn(6, 28)
    torch.manual_seed(0)
    value = dropping(x, y)
    torch.manual_seed(0)
    assert torch.equal(value, plain(F.dropout(x, 0.5), y))
    assert torch.equal(dropping.eval()(x, y), plain(x, y))


@methods
def test_adapters_are_added_switched_disabled_and_deleted(llama, method):
    base, model = logits(plain_model(llama)), adapted(llama, method)
    first = logits(model)
    model.add_adapter("second", config_of(method, num_experts=2, alpha=1.0))
    assert torch.equal(logits(model), first)
    model.set_adapter("second")
    assert torch.equal(logits(model), base)  # its B is 0
    assert all(".second." in name for name, p in model.named_parameters() if p.requires_grad)
    wake(model)
    second = logits(model)
    model.set_adapter("default")
    first = logits(model)
    assert min(off(first, base), off(second, base), off(first, second)) > 0.01
    with model.disable_adapter():
        assert torch.equal(logits(model), base)
    model.set_adapter("second")
    assert torch.equal(logits(model), second)
    model.set_adapter("default")
    model.delete_adapter("second")
    assert torch.equal(logits(model), first)
    assert not any(".second." in name for name, _ in model.named_parameters())


def test_a_first_adapter_of_any_name_is_active(llama):
    model = get_peft_model(plain_model(llama), config_of("teamlora"), adapter_name="poems")
    before = logits(model)
    wake(model)
    assert off(logits(model), before) > 0.1
    assert all(".poems." in name for name, p in model.named_parameters() if p.requires_grad)


@methods
def test_two_active_adapters_add_their_updates(method):
    layer, x, updates = layer_of(method), torch.randn(5, 20), []
    layer.update_layer("second", config_of(method, num_experts=2))
    wake(layer)
    for active in ("default", "second", ["default", "second"]):
        layer.set_adapter(active)
        updates.append(layer(x) - layer.base_layer(x))
    assert off(updates[0] + updates[1], updates[2]) <= 1e-5


@methods
def test_merging_is_refused_with_its_reason_and_unloading_gives_the_base_back(llama, method):
    model = adapted(llama, method)
    for merge in (model.merge_adapter, model.merge_and_unload):
        with pytest.raises(ValueError, match="cannot be merged into the base: its gate depends on the token"):
            merge()
    assert torch.equal(logits(model.unload()), logits(plain_model(llama)))


ALL_LINEARS = {f"{i}.{m}_proj" for i in (0, 1) for m in ("self_attn.q", "self_attn.k", "self_attn.v", "self_attn.o",
                                                         "mlp.gate", "mlp.up", "mlp.down")}  # fmt: skip


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, {name for name in ALL_LINEARS if ".mlp." in name}),
        ({"target_modules": ["q_proj", "down_proj"]}, {n for n in ALL_LINEARS if n.endswith(("q_proj", "down_proj"))}),
        ({"target_modules": "all-linear"}, ALL_LINEARS),
        ({"target_modules": r".*\.1\.self_attn\.[qk]_proj"}, {"1.self_attn.q_proj", "1.self_attn.k_proj"}),
        ({"layers_to_transform": [1]}, {"1.mlp.gate_proj", "1.mlp.up_proj", "1.mlp.down_proj"}),
        ({"exclude_modules": ["up_proj", "down_proj"]}, {"0.mlp.gate_proj", "1.mlp.gate_proj"}),
    ],
    ids=["default", "names", "all-linear", "regular expression", "layers_to_transform", "exclude_modules"],
)
def test_adapters_go_where_the_configuration_says(llama, options, expected):
    model = adapted(llama, "teamlora", **options)
    assert adapted_linears(model) == expected
    value = logits(model)
    assert off(value, logits(with_loops(model, config_of("teamlora")))) <= 1e-5


@methods
def test_what_is_no_linear_layer_is_refused_by_its_name(llama, method):
    with pytest.raises(ValueError, match=r"model\.embed_tokens is a Embedding, expected a linear layer"):
        adapted(llama, method, target_modules=["embed_tokens"])


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"num_experts": 0}, "num_experts is 0, expected a positive integer"),
        ({"expert_rank": -1}, "expert_rank is -1, expected a positive integer"),
        ({"dropout": 1.0}, "dropout is 1.0, expected a number from 0 to below 1"),
        ({"layers_to_transform": [0], "target_modules": ".*proj"}, "layers_to_transform has no effect"),
        ({"layers_pattern": "layers"}, "layers_pattern has no effect"),
    ],
)
def test_configuration_that_makes_no_adapter_is_refused(options, text):
    with pytest.raises(ValueError, match=text):
        config_of("teamlora", **options)
