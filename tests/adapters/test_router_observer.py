"""Gates watched and given to one expert, against the methods' equations written out token by token."""

import pytest
import torch

from tests.adapters.reference import loop
from tests.support.tiny_adapters import METHODS, config_of, make_experts
from trainer.adapters.router_observer import observe_routers, only_expert, router_weights

methods = pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in METHODS), ("teamlora", {"renormalize": True})]
)


def parts(method, options):
    torch.manual_seed(1)
    config = config_of(method, **options)
    module = make_experts(config, dtype=torch.float64).eval()
    return config, module, torch.randn(2, 3, 20).double(), torch.randn(2, 3, 28).double()


def written_out(module, x, renormalize):
    """phi and omega of one token [d_in]."""
    phi = torch.softmax(module.router @ x, 0)
    omega = phi if module.interaction is None else module.interaction @ phi
    return phi, omega / max(float(omega.sum()), 0.1) if renormalize else omega


@methods
def test_weights_are_those_of_the_equations_token_by_token(method, options):
    _, module, x, _ = parts(method, options)
    phi, omega = router_weights(module, x)
    for index in [(b, t) for b in range(2) for t in range(3)]:
        expected = written_out(module, x[index], options.get("renormalize"))
        assert torch.allclose(phi[index], expected[0].float(), atol=1e-6)
        assert torch.allclose(omega[index], expected[1].float(), atol=1e-5)


@methods
@pytest.mark.parametrize("expert", [0, 2])
def test_an_expert_alone_computes_its_own_update_under_the_sum_of_all_weights(method, options, expert):
    config, module, x, y = parts(method, options)
    slices = module.lora_a.split(module.experts.shape[1]) if method != "hydralora" else [module.lora_a] * 4
    scale = config.alpha / config.expert_rank * (1 if method == "hydralora" else 4)
    expected = y.clone()
    for index in [(b, t) for b in range(2) for t in range(3)]:
        _, omega = written_out(module, x[index], options.get("renormalize"))
        expected[index] += scale * omega.sum() * (module.experts[expert].T @ (slices[expert] @ x[index]))
    with only_expert(module, expert), torch.no_grad():
        assert torch.allclose(module(x, y), expected, rtol=1e-5, atol=1e-5)


def test_an_expert_is_alone_also_where_few_tokens_are_served_quicker():
    _, module, x, y = parts("teamlora", {})
    with torch.no_grad():
        with only_expert(module, 1):
            expected = module(x, y)
        module.freeze()
        frozen = module(x, y)
        with only_expert(module, 1):
            assert torch.equal(module(x, y), expected)
        assert torch.equal(module(x, y), frozen)
    assert not torch.allclose(frozen, expected)


@methods
def test_afterwards_everything_is_as_it_was(method, options):
    config, module, x, y = parts(method, options)
    before = {name: p.clone() for name, p in module.named_parameters()}
    with only_expert(module, 1):
        pass
    assert {name: p.shape for name, p in module.named_parameters()} == {n: p.shape for n, p in before.items()}
    assert torch.allclose(module(x, y), loop(config, before, x, y))


def test_watching_sees_each_forward_and_changes_nothing():
    _, module, x, y = parts("teamlora", {})
    found, plain = [], module(x, y)
    with observe_routers(module, lambda index, phi, omega: found.append((index, phi.shape, omega.shape))):
        assert torch.equal(module(x, y), plain)
    module(x, y)
    assert found == [(0, (2, 3, 4), (2, 3, 4))]
