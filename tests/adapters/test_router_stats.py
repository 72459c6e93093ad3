"""Router statistics and the balance loss's gradient, against means and autograd written out over the whole batch."""

import math
import warnings
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.adapters.reference import copied, loop, off
from tests.support.tiny_adapters import METHODS, config_of, make_experts, wake
from trainer.adapters.adapter_config import ExpertLoraConfig
from trainer.adapters.layer import HydraLoraLayer, MoeLoraLayer, TeamLoraLayer
from trainer.adapters.router_stats import RouterReport, RouterStats, by_decoder_layer, place_of

LAYERS = {"teamlora": TeamLoraLayer, "moelora": MoeLoraLayer, "hydralora": HydraLoraLayer}
WEIGHT = 100.0  # so that the balance term is no small part of the gradients compared
ROWS, SEQ, WIDTH = 6, 5, 20
WHOLE, ALIKE, UNEVEN = [6], [2, 2, 2], [1, 3, 2]
cuts = pytest.mark.parametrize("cut", [WHOLE, ALIKE, UNEVEN], ids=["whole", "alike", "uneven"])
methods = pytest.mark.parametrize("method", METHODS)


class Net(nn.Module):
    """Two adapted linears in fp64; the loss of a row is the sum of squares at its real tokens."""

    def __init__(self, config: ExpertLoraConfig, method: str, recompute: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.config, self.recompute = config, recompute
        self.layers = nn.ModuleList(LAYERS[method](nn.Linear(WIDTH, WIDTH), "default", config) for _ in range(2))
        wake(self)
        self.double()
        self.names = [f"layers.{i}.{LAYERS[method].adapter_layer_names[0]}.default" for i in range(2)]

    def forward(self, x: Tensor, real: Tensor) -> Tensor:
        for layer in self.layers:
            x = checkpoint(layer, x, use_reentrant=False) if self.recompute else layer(x)
            x = torch.tanh(x)
        return x[real].square().sum()


def batch_of(seed: int) -> tuple[Tensor, Tensor]:
    """x [rows, seq, width] and which tokens are real; rows differ in length."""
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(1, SEQ + 1, (ROWS, 1), generator=generator)
    return torch.randn(ROWS, SEQ, WIDTH, generator=generator).double(), torch.arange(SEQ) < lengths


def net_of(method: str, weight: float = WEIGHT, recompute: bool = False, **options: object) -> Net:
    return Net(config_of(method, balance_loss_weight=weight, **options), method, recompute)


def train_step(
    net: Net,
    router_stats: RouterStats,
    batch: tuple[Tensor, Tensor],
    cut: list[int] = WHOLE,
    scale: float = 1.0,
    tasks: Tensor | None = None,
    measure: bool = True,
) -> tuple[RouterReport | None, dict[str, Tensor]]:
    """One optimizer step as the loop drives it, less the optimizer; the gradients it leaves, by name."""
    x, real = batch
    tasks = one_task(real) if tasks is None else tasks
    net.zero_grad()
    router_stats.begin_step(int(real.sum()), measure)
    for part, mask, ids in zip(x.split(cut), real.split(cut), tasks.split(cut), strict=True):
        router_stats.begin_micro_batch(ids)
        (router_stats.capture_loss_grad(net(part, mask) / real.sum()) * scale).backward()
        router_stats.end_micro_batch()
    return router_stats.end_step(), {name: p.grad for name, p in net.named_parameters() if p.grad is not None}


def written_out(net: Net, batch: tuple[Tensor, Tensor], means: list[Tensor]) -> tuple[list[Tensor], dict[str, Tensor]]:
    """The same step over the whole batch at once: phi of each layer [real, k], gradients of task + balance loss.

    The balance loss is the mean over layers of sum_i 2 (m_i - 1/k) mean(phi_i), m of the step before.
    """
    x, real = batch
    leaves, phis, balance = {}, [], x.new_zeros(())
    for layer, prefix, mean in zip(net.layers, net.names, means, strict=True):
        p = copied(layer.adapters["default"])
        leaves |= {f"{prefix}.{name}": leaf for name, leaf in p.items()}
        phi = torch.softmax(x[real] @ p["router"].t(), dim=-1)
        balance = balance + (2 * (mean - 1 / phi.shape[1]) * phi.mean(0)).sum() / len(net.layers)
        x = torch.tanh(loop(net.config, p, x, layer.base_layer(x)))
        phis.append(phi.detach())
    (x[real].square().sum() / real.sum() + net.config.balance_loss_weight * balance).backward()
    return phis, {name: leaf.grad for name, leaf in leaves.items()}


def one_task(real: Tensor) -> Tensor:
    """Task ids of tokens that are all of task 0, or padding."""
    return real.long() - 1


def uniform_means(net: Net) -> list[Tensor]:
    return [torch.full((4,), 0.25).double() for _ in net.layers]


def assert_gradients(ours: dict[str, Tensor], expected: dict[str, Tensor], scale: float = 1.0) -> None:
    distances = {name: off(ours[name], scale * gradient) for name, gradient in expected.items()}
    assert max(distances.values()) <= 1e-6, distances  # means and slopes are kept in fp32


@cuts
@methods
def test_report_is_the_mean_over_real_tokens_however_the_batch_is_cut(method, cut):
    net, batch = net_of(method), batch_of(1)
    phis, _ = written_out(net, batch, uniform_means(net))
    report, _ = train_step(net, RouterStats(net), batch, cut)
    assert torch.allclose(report.weights, torch.stack([phi.mean(0) for phi in phis]).float(), atol=1e-6)
    entropy = torch.stack([-(phi * phi.log()).sum(1).mean() for phi in phis]).float()
    assert torch.allclose(report.entropy, entropy, atol=1e-6)
    expected = sum(((phi.mean(0) - 0.25) ** 2).sum() for phi in phis) / len(phis)
    assert report.balance == pytest.approx(expected.item(), rel=1e-5)


@cuts
@methods
def test_report_by_task_is_the_mean_over_the_tasks_tokens_however_the_batch_is_cut(method, cut):
    net, (x, real) = net_of(method), batch_of(1)
    tasks = torch.randint(0, 2, real.shape, generator=torch.Generator().manual_seed(4))
    tasks = torch.where(real, 2 * tasks, -1)  # task 1 does not occur
    phis, _ = written_out(net, (x, real), uniform_means(net))
    report, _ = train_step(net, RouterStats(net, num_tasks=3), (x, real), cut, tasks=tasks)
    assert report.names == tuple(net.names)
    assert report.task_tokens.tolist() == [(tasks == task).sum() for task in range(3)]
    assert report.weights_by_task[:, 1].isnan().all()
    assert report.entropy_by_task[:, 1].isnan().all()
    for task in (0, 2):
        mine = [phi[tasks[real] == task] for phi in phis]
        expected = torch.stack([phi.mean(0) for phi in mine]).float()
        assert torch.allclose(report.weights_by_task[:, task], expected, atol=1e-6)
        entropy = torch.stack([-(phi * phi.log()).sum(1).mean() for phi in mine]).float()
        assert torch.allclose(report.entropy_by_task[:, task], entropy, atol=1e-6)


def test_a_report_comes_to_the_host_in_one_copy():
    """On a GPU each copy waits for all work before it."""
    net, batch = net_of("teamlora"), batch_of(1)
    report, _ = train_step(net, RouterStats(net), batch)
    tensors = [value for value in vars(report).values() if isinstance(value, Tensor)]
    assert len(tensors) == 6
    assert len({tensor.untyped_storage().data_ptr() for tensor in tensors}) == 1


def test_report_holds_the_interaction_matrices_and_the_mean_weights_after_competition():
    net, batch = net_of("teamlora"), batch_of(1)
    phis, _ = written_out(net, batch, uniform_means(net))
    report, _ = train_step(net, RouterStats(net), batch)
    matrices = [layer.adapters["default"].interaction.detach() for layer in net.layers]
    assert torch.allclose(report.interaction, torch.stack(matrices).float())
    omega = torch.stack([(phi @ m.T).mean(0) for phi, m in zip(phis, matrices, strict=True)]).float()
    assert torch.allclose(report.omega, omega, atol=1e-6)


@pytest.mark.parametrize(("method", "options"), [("moelora", {}), ("teamlora", {"renormalize": True})])
def test_no_mean_after_competition_is_told_without_a_matrix_or_where_weights_are_renormalised(method, options):
    net = net_of(method, **options)
    report, _ = train_step(net, RouterStats(net), batch_of(1))
    assert report.omega is None
    assert (report.interaction is None) == (method == "moelora")


@pytest.mark.parametrize("weight", [0.0, WEIGHT])
def test_measuring_changes_no_bit_of_what_is_trained(weight):
    found = []
    for measure in (True, False):
        net = net_of("teamlora", weight)
        router_stats = RouterStats(net, num_tasks=2)
        for seed in (1, 2, 3):
            report, gradients = train_step(net, router_stats, batch_of(seed), UNEVEN, measure=measure)
        assert (report is not None) == measure
        found.append(gradients)
    assert all(torch.equal(found[1][name], gradient) for name, gradient in found[0].items())


def test_uniform_routers_have_all_the_entropy_there_is():
    net = net_of("teamlora")
    for layer in net.layers:
        nn.init.zeros_(layer.adapters["default"].router)
    report, _ = train_step(net, RouterStats(net), batch_of(1))
    assert report.entropy.tolist() == pytest.approx([math.log(4)] * 2)
    assert report.entropy_share == pytest.approx(1)


def test_decoder_layer_and_kind_of_linear_are_read_from_the_name():
    name = "base_model.model.model.layers.12.mlp.up_proj.teamlora_experts.default"
    assert place_of(name) == (12, "up_proj")
    other = name.replace("up_proj", "down_proj").replace("12", "3")
    values = by_decoder_layer([name, other, name.replace("up", "gate")], torch.tensor([[1.0], [5.0], [2.0]]))
    assert {layer: value.tolist() for layer, value in values.items()} == {3: [5.0], 12: [1.5]}


def test_what_stands_in_padding_changes_nothing():
    net, (x, real) = net_of("teamlora"), batch_of(1)
    other = torch.where(real[..., None], x, 100 * torch.randn_like(x))
    for values in (x, other):
        router_stats = RouterStats(net)
        train_step(net, router_stats, batch_of(2))
        report, gradients = train_step(net, router_stats, (values, real))
        if values is x:
            first_report, first = report, {name: g.clone() for name, g in gradients.items()}
    assert torch.allclose(report.weights, first_report.weights, atol=1e-7)
    assert all(off(gradients[name], gradient) <= 1e-9 for name, gradient in first.items())


@cuts
@methods
def test_balance_gradient_is_autograd_of_the_term_delayed_by_a_step_however_the_batch_is_cut(method, cut):
    net = net_of(method)
    router_stats, first, second = RouterStats(net), batch_of(1), batch_of(2)
    _, ours = train_step(net, router_stats, first, cut)
    phis, expected = written_out(net, first, uniform_means(net))
    assert_gradients(ours, expected)
    _, ours = train_step(net, router_stats, second, cut)
    _, expected = written_out(net, second, [phi.mean(0) for phi in phis])
    assert_gradients(ours, expected)
    _, of_task = written_out(net, second, uniform_means(net))
    assert off(of_task[net.names[0] + ".router"], expected[net.names[0] + ".router"]) > 0.1


def test_balance_gradient_is_scaled_as_the_loss_is():
    net = net_of("teamlora")
    router_stats = RouterStats(net)
    train_step(net, router_stats, batch_of(1), scale=1024.0)
    phis, _ = written_out(net, batch_of(1), uniform_means(net))
    _, ours = train_step(net, router_stats, batch_of(2), UNEVEN, scale=1024.0)
    _, expected = written_out(net, batch_of(2), [phi.mean(0) for phi in phis])
    assert_gradients(ours, expected, scale=1024.0)


@cuts
@methods
def test_recomputed_activations_count_once(method, cut):
    net, recomputing = net_of(method), net_of(method, recompute=True)
    router_stats, recomputing_routing = RouterStats(net), RouterStats(recomputing)
    for seed in (1, 2):
        report, gradients = train_step(net, router_stats, batch_of(seed), cut)
        again, gradients_again = train_step(recomputing, recomputing_routing, batch_of(seed), cut)
        assert torch.equal(again.weights, report.weights)
        assert torch.equal(again.entropy, report.entropy)
        assert all(torch.equal(gradients_again[name], gradient) for name, gradient in gradients.items())


@cuts
def test_uniform_routers_feel_no_balance_loss_of_any_weight(cut):
    gradients = []
    for weight in (0.0, 1e6):
        net = net_of("teamlora", weight)
        for layer in net.layers:
            nn.init.zeros_(layer.adapters["default"].router)
        router_stats = RouterStats(net)
        for seed in (1, 2):
            report, found = train_step(net, router_stats, batch_of(seed), cut)
        assert report.balance == 0
        gradients.append(found)
    assert all(torch.equal(gradients[0][name], gradients[1][name]) for name in gradients[0])


def test_an_unmeasured_step_without_balance_loss_reports_nothing():
    net = net_of("teamlora", weight=0.0)
    router_stats, (x, real) = RouterStats(net), batch_of(1)
    router_stats.begin_step(int(real.sum()), measure=False)
    router_stats.begin_micro_batch(one_task(real))
    router_stats.capture_loss_grad(net(x, real)).backward()
    router_stats.end_micro_batch()
    assert router_stats.end_step() is None


def test_evaluation_between_micro_batches_is_not_counted():
    net, (x, real) = net_of("teamlora"), batch_of(1)
    undisturbed, _ = train_step(net, RouterStats(net), (x, real))
    router_stats = RouterStats(net)
    router_stats.begin_step(int(real.sum()), measure=True)
    router_stats.begin_micro_batch(one_task(real))
    router_stats.capture_loss_grad(net(x, real)).backward()
    net.eval()(batch_of(2)[0], real)
    net.train()
    router_stats.end_micro_batch()
    assert torch.equal(router_stats.end_step().weights, undisturbed.weights)


def test_a_model_without_routers_is_driven_all_the_same():
    net = nn.Linear(3, 1)
    router_stats = RouterStats(net)
    router_stats.begin_step(2, measure=True)
    router_stats.begin_micro_batch(torch.zeros(1, 2, dtype=torch.int64))
    router_stats.capture_loss_grad(net(torch.ones(1, 2, 3)).sum()).backward()
    router_stats.end_micro_batch()
    assert router_stats.end_step() is None
    assert net.weight.grad is not None


def warnings_of(call: Callable[[], object]) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(3):
            call()
    return [str(warning.message) for warning in caught]


def test_balance_loss_that_no_loop_drives_is_told_once_and_adds_nothing():
    balanced, plain = (make_experts(config_of("teamlora", balance_loss_weight=weight)) for weight in (1.0, 0.0))
    x, y = torch.randn(6, 20), torch.randn(6, 28)
    [message] = warnings_of(lambda: balanced(x, y).sum().backward())
    assert message.startswith("balance_loss_weight has no effect: no training loop drives the routers")
    assert warnings_of(lambda: plain(x, y).sum().backward()) == []
    assert torch.equal(balanced.router.grad, plain.router.grad)


def test_nothing_is_told_outside_training_or_where_a_loop_drives():
    balanced = make_experts(config_of("teamlora", balance_loss_weight=1.0)).eval()
    assert warnings_of(lambda: balanced(torch.randn(6, 20), torch.randn(6, 28))) == []
    net = net_of("teamlora")
    router_stats = RouterStats(net)
    assert warnings_of(lambda: train_step(net, router_stats, batch_of(1))) == []
