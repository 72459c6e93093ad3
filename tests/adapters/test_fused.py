"""The fused update against the loop over experts: outputs, gradients, precision, and what is kept for backward."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from tests.adapters.reference import SMALLEST_SUM, copied, loop, off
from tests.support.tiny_adapters import METHODS, config_of, make_experts
from trainer.adapters.fused import RENORMALIZE_FLOOR, Gate, gated_experts
from trainer.adapters.layer import Experts

CASES = [("teamlora", {}), ("teamlora", {"renormalize": True}), ("moelora", {}), ("hydralora", {})]
methods = pytest.mark.parametrize(("method", "options"), CASES, ids=["teamlora", "renormalized", *list(METHODS)[1:]])


def inputs(*rows: int, d_in: int = 20, d_out: int = 28, dtype: torch.dtype = torch.float32) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(*rows, d, generator=generator).to(dtype).requires_grad_() for d in (d_in, d_out)]


def both(method: str, options: dict, *rows: int, dtype=torch.float32, adapter=torch.float32) -> tuple[dict, dict]:
    """Output and every gradient, by name: of the fused update, and of the loop in fp64 from the same values."""
    config = config_of(method, **options)
    experts, (x, y) = make_experts(config, dtype=adapter), inputs(*rows, dtype=dtype)
    parameters, (x64, y64) = copied(experts), [t.detach().double().requires_grad_() for t in (x, y)]
    out, expected = experts(x, y), loop(config, parameters, x64, y64)
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(2)).to(dtype)
    out.backward(upstream)
    expected.backward(upstream.double())
    leaves, leaves64 = {"x": x, "y": y, **dict(experts.named_parameters())}, {"x": x64, "y": y64, **parameters}
    assert all(leaf.grad.dtype == leaf.dtype for leaf in leaves.values())
    return (
        {"out": out.detach(), **{name: leaf.grad for name, leaf in leaves.items()}},
        {"out": expected.detach(), **{name: leaf.grad for name, leaf in leaves64.items()}},
    )


def assert_close(pair: tuple[dict, dict], tolerance: float) -> None:
    ours, expected = pair
    distances = {name: off(value, expected[name]) for name, value in ours.items()}
    assert max(distances.values()) <= tolerance, distances


@methods
@pytest.mark.parametrize("rows", [(1,), (10,), (2, 5)], ids=["one token", "tokens", "batch and sequence"])
def test_output_and_every_gradient_equal_the_loop(method, options, rows):
    assert_close(both(method, options, *rows), 1e-5)


@pytest.mark.parametrize("k", [1, 3])
@methods
def test_any_number_of_experts(method, options, k):
    assert_close(both(method, {**options, "num_experts": k}, 6), 1e-5)


@methods
def test_gradients_pass_gradcheck(method, options):
    experts = make_experts(config_of(method, **options), 5, 6, torch.float64)
    names = [name for name, _ in experts.named_parameters()]

    def call(x: Tensor, y: Tensor, *values: Tensor) -> Tensor:
        return torch.func.functional_call(experts, dict(zip(names, values, strict=True)), (x, y))

    assert torch.autograd.gradcheck(call, (*inputs(3, d_in=5, d_out=6, dtype=torch.float64), *experts.parameters()))


@methods
def test_a_frozen_part_gets_no_gradient_and_the_others_keep_theirs(method, options):
    def gradients(frozen: str | None) -> dict[str, Tensor | None]:
        experts, (x, y) = make_experts(config_of(method, **options)), inputs(4)
        leaves = {"x": x, "y": y, **dict(experts.named_parameters())}
        for name, leaf in leaves.items():
            leaf.requires_grad_(name != frozen)
        experts(x, y).square().sum().backward()
        return {name: leaf.grad for name, leaf in leaves.items()}

    free = gradients(None)
    for frozen in free:
        held = gradients(frozen)
        assert held.pop(frozen) is None
        assert all(torch.equal(held[name], free[name]) for name in held), frozen


@methods
def test_output_without_gradient_is_the_same_and_the_base_output_is_left_alone(method, options):
    experts, (x, y) = make_experts(config_of(method, **options)), inputs(4)
    before, trained = y.detach().clone(), experts(x, y)
    with torch.no_grad():
        assert torch.equal(experts(x, y), trained)
    assert torch.equal(y, before)


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@methods
def test_a_frozen_adapter_computes_the_loop_for_few_tokens_and_many(method, options, dtype, tolerance):
    config = config_of(method, **options)
    experts = make_experts(config, dtype=dtype)
    experts.freeze()
    for rows in ((16, 1), (2, 50)):
        x, y = (t.detach() for t in inputs(*rows, dtype=dtype))
        before = y.clone()
        with torch.no_grad():
            out = experts(x, y)
        assert out.dtype == dtype
        assert off(out, loop(config, copied(experts), x.double(), y.double()).detach()) <= tolerance
        assert torch.equal(y, before)


def test_a_frozen_adapter_with_gradients_still_gives_them():
    experts = make_experts(config_of("teamlora"))
    experts.freeze()
    experts(*inputs(1)).sum().backward()
    assert all(p.grad is not None for p in experts.parameters())


@methods
def test_views_in_and_an_expanded_gradient_from_behind(method, options):
    config = config_of(method, **options)
    experts, (x, y) = make_experts(config), inputs(20, 2, d_in=3, d_out=28)
    strided = x.permute(2, 1, 0), y[:3]  # [3, 2, 20] and [3, 2, 28], neither contiguous throughout
    experts(*strided).sum().backward()
    x64, parameters = strided[0].detach().double().requires_grad_(), copied(experts)
    loop(config, parameters, x64, strided[1].detach().double()).sum().backward()
    assert off(x.grad.permute(2, 1, 0), x64.grad) <= 1e-5
    assert off(experts.experts.grad, parameters["experts"].grad) <= 1e-5


def kept_bytes(call: Callable[[], Tensor], *there_anyway: Tensor) -> int:
    """What a call newly keeps for backward; memory that two tensors share counts once."""
    owned, kept = {tensor.untyped_storage().data_ptr() for tensor in there_anyway}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = call()
    del out
    return sum(size for pointer, size in kept.items() if pointer not in owned)


@methods
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_keeps_for_backward_beside_its_input_what_a_lora_keeps_and_k_values_a_token(method, options, dtype):
    config = config_of(method, **options)
    experts, (x, y) = make_experts(config, dtype=dtype), inputs(2, 50, dtype=dtype)
    rank = len(experts.lora_a)
    a, b = torch.randn(rank, 20).to(dtype).requires_grad_(), torch.randn(28, rank).to(dtype).requires_grad_()
    lora = kept_bytes(lambda: y + 2.0 * F.linear(F.linear(x, a), b), x, a, b)
    ours = kept_bytes(lambda: experts(x, y), x, *experts.parameters())
    assert lora == 100 * rank * dtype.itemsize
    assert ours <= lora + 100 * config.num_experts * dtype.itemsize


@methods
def test_fp32_adapter_on_a_bf16_base_computes_in_fp32_and_rounds_once(method, options):
    ours, expected = both(method, options, 2, 5, dtype=torch.bfloat16)
    rounded = {"out", "x", "y"}
    assert_close(({n: t for n, t in ours.items() if n not in rounded}, expected), 1e-5)
    assert {ours[name].dtype for name in rounded} == {torch.bfloat16}
    for name in rounded:
        assert torch.allclose(ours[name].double(), expected[name], rtol=2**-8, atol=1e-5), name


@methods
def test_bf16_adapter_on_a_bf16_base_is_the_loop_to_bf16_precision(method, options):
    assert_close(both(method, options, 2, 5, dtype=torch.bfloat16, adapter=torch.bfloat16), 3e-2)


@methods
def test_under_autocast_matrices_meet_in_its_dtype_and_gradients_come_in_their_own(method, options):
    config = config_of(method, **options)
    experts, (x, y) = make_experts(config), inputs(2, 5)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = experts(x, y.bfloat16())
        kept = kept_bytes(lambda: experts(x, y.bfloat16()), x, *experts.parameters())
    assert kept == 10 * (len(experts.lora_a) + config.num_experts) * torch.bfloat16.itemsize
    assert out.dtype == torch.bfloat16
    out.float().sum().backward()  # outside autocast, where a training loop calls it
    parameters, x64 = copied(experts), x.detach().double().requires_grad_()
    expected = loop(config, parameters, x64, y.detach().double())
    expected.sum().backward()
    assert off(out, expected) <= 1e-2
    assert off(x.grad, x64.grad) <= 2e-2
    for name, parameter in experts.named_parameters():
        assert parameter.grad.dtype == torch.float32
        assert 0 < off(parameter.grad, parameters[name].grad) <= 2e-2, name


def test_second_derivative_is_refused():
    experts, (x, y) = make_experts(config_of("teamlora")), inputs(4)
    with pytest.raises(RuntimeError, match="no second derivative"):
        torch.autograd.grad(experts(x, y).sum(), x, create_graph=True)


@pytest.mark.parametrize("autocast", [False, True])
def test_in_bf16_softmax_and_competition_see_fp32(autocast):
    """Weights that differ by 1e-3 around 1/2 are one number in bf16; here their difference is the whole output."""
    step, contrast = 2**-8, 64.0
    values = {
        "x": torch.ones(1, 1),
        "y": torch.zeros(1, 1),
        "a": torch.ones(2, 1),
        "router": torch.tensor([[step], [-step]]),
        "interaction": torch.tensor([[contrast, -contrast], [0.0, 0.0]]),
        "experts": torch.tensor([1.0, 0.0]).view(2, 1, 1),
    }
    if not autocast:
        values = {name: value.bfloat16() for name, value in values.items()}
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        out = gated_experts(**values, gate=Gate(heads=2, scale=1.0))
    expected = contrast * torch.tanh(torch.tensor(step))  # softmax of (s, -s), first less second, is tanh(s)
    assert out.item() == pytest.approx(expected.item(), rel=2**-8)


def test_renormalised_weights_sum_to_k():
    config = config_of("teamlora", renormalize=True, alpha=3.0)
    experts = make_experts(config)
    with torch.no_grad():
        experts.lora_a[:], experts.experts[:] = 0, 1
        experts.lora_a[:, 0] = 1  # each expert's B_i A x is r_B = alpha wherever x begins with 1
        experts.interaction[:] = torch.eye(4) * 7
    x = torch.randn(5, 20)
    x[:, 0] = 1
    assert torch.allclose(experts(x, torch.zeros(5, 28)), torch.full((5, 28), 4.0 * 3.0), rtol=1e-5)


@pytest.mark.parametrize("total", [0.0, -2.0], ids=["sum is 0", "sum is negative"])
def test_renormalisation_stays_finite_and_is_scaled_by_the_floor(total):
    assert RENORMALIZE_FLOOR == SMALLEST_SUM
    config = config_of("teamlora", renormalize=True)
    plain = config_of("teamlora")
    experts, (x, y) = make_experts(config), inputs(6)
    with torch.no_grad():
        columns = experts.interaction
        columns += (total - columns.sum(0)) / 4  # every column sums to `total`, and so does every omega
    unnormalised = Experts(20, 28, plain)
    unnormalised.load_state_dict(experts.state_dict())
    out = experts(x, y)
    assert torch.allclose(out - y, (unnormalised(x, y) - y) / SMALLEST_SUM, rtol=1e-4, atol=1e-5)
    out.sum().backward()
    assert all(torch.isfinite(leaf.grad).all() for leaf in (x, y, *experts.parameters()))


def test_with_the_identity_for_m_teamlora_is_moelora():
    team, moe = (make_experts(config_of(method)) for method in ("teamlora", "moelora"))
    with torch.no_grad():
        team.interaction.copy_(torch.eye(4))
    moe.load_state_dict({n: p for n, p in team.state_dict().items() if n != "interaction"})
    x, y = inputs(6)
    assert off(team(x, y) - y, moe(x, y) - y) <= 1e-6
