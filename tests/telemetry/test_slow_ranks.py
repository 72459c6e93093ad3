"""What of a step is timed, which ranks are named as slow, and when: once, and again once they are not."""

from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from trainer.telemetry import slow_ranks
from trainer.telemetry.slow_ranks import MOST_LAYERS, ForwardTimer, SlowRanks

HOSTS = ("node-a", "node-a", "node-b", "node-b")


@pytest.fixture(autouse=True)
def rank_0(monkeypatch):
    monkeypatch.setattr(dist, "get_rank", lambda: 0)


def lines(capsys, *windows: list[int], hosts=HOSTS, window=0.0) -> list[str]:
    """What is said after each window."""
    ranks = SlowRanks(nn.Module(), torch.device("cpu"), hosts, window)
    said = []
    for times in windows:
        ranks.add(times)
        out, err = capsys.readouterr()
        said.append(out + err)
    return said


def test_a_slow_rank_is_named_once_with_its_host_and_by_how_much(capsys):
    slow, even = [10, 11, 95, 9], [10, 11, 12, 9]
    named, again, recovered, quiet = lines(capsys, slow, slow, even, even)
    assert named == (
        "warning: rank 2 on node-b computes 9.5 times slower than the others (their median, over 0 s), and all wait "
        "for it; look there for other processes, limits of CPU time, heat\n"
    )
    assert recovered == "slow ranks      rank 2 on node-b is no longer slow\n"
    assert again == quiet == ""


@pytest.mark.parametrize("times", [[10, 11, 12, 9], [10, 29, 10, 10], [0, 0, 0, 0], [5, 0, 0, 0]])
def test_an_even_load_is_not_reported_nor_one_that_was_not_measured(capsys, times):
    assert lines(capsys, times) == [""]


def test_of_two_ranks_either_is_compared_with_the_other(capsys):
    said = lines(capsys, [10, 100], [100, 10], hosts=("a", "b"))
    assert said[0].startswith("warning: rank 1 on b computes 10.0 times")
    assert "rank 1 on b is no longer slow" in said[1] and "warning: rank 0 on a computes 10.0 times" in said[1]


def test_two_slow_ranks_do_not_hide_each_other(capsys):
    (said,) = lines(capsys, [10, 100, 90], hosts=("a", "b", "c"))
    assert "rank 1 on b" in said and "rank 2 on c" in said and "rank 0" not in said


def test_what_is_slow_for_less_than_a_window_is_not_named(capsys):
    assert lines(capsys, [10, 10, 500, 10], [10, 10, 10, 10], window=1000.0) == ["", ""]


def test_a_rank_between_the_limits_stays_as_it_was(capsys):
    """A rank at the border is not named again and again."""
    between = [10, 10, 25, 10]
    assert lines(capsys, between) == [""]
    assert lines(capsys, [10, 10, 40, 10], between, between)[1:] == ["", ""]


@pytest.mark.parametrize("hosts", [(), ("a",)])
def test_a_rank_alone_is_not_timed(hosts):
    ranks = SlowRanks(nn.Module(), torch.device("cpu"), hosts, 0.0)
    assert ranks.own_time() == []
    ranks.add([])


class Clock:
    """Seconds, as a CPU counts them and as events of a GPU do."""

    def __init__(self, monkeypatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(slow_ranks.time, "perf_counter", lambda: self.now)
        monkeypatch.setattr(torch.cuda, "Event", self.event)

    def event(self, enable_timing: bool) -> SimpleNamespace:
        assert enable_timing
        event = SimpleNamespace(elapsed_time=lambda later: 1000 * (later.at - event.at))
        event.record = lambda: setattr(event, "at", self.now)
        return event

    def passes(self, seconds: float) -> None:
        self.now += seconds


class Adapted(nn.Module, BaseTunerLayer):
    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.base_layer(x)


class Frozen(nn.Module):
    """Takes two seconds, and three more to gather its weight before and to release it after."""

    def __init__(self, clock: Clock) -> None:
        super().__init__()
        self.clock, self.fails = clock, False
        self.register_forward_pre_hook(lambda *_: clock.passes(3.0))
        self.register_forward_hook(lambda *_: clock.passes(3.0))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.clock.passes(2.0)
        if self.fails:
            raise ValueError
        return x


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_frozen_layers_are_timed_without_the_gathering_of_their_weights(monkeypatch, device):
    clock = Clock(monkeypatch)
    model = nn.Sequential(Adapted(Frozen(clock)), Frozen(clock), Adapted(Frozen(clock)))
    timer = ForwardTimer(model, torch.device(device))
    model(torch.ones(1))
    model(torch.ones(1))
    assert timer.take() == pytest.approx(2 * 2 * 2.0)
    assert timer.take() == 0
    model.eval()(torch.ones(1))
    assert timer.take() == 0


def test_a_recomputed_forward_that_ends_early_is_not_timed(monkeypatch):
    """As non-reentrant checkpointing ends it, by an exception, once it has what backward needs."""
    frozen = Frozen(Clock(monkeypatch))
    timer = ForwardTimer(Adapted(frozen), torch.device("cpu"))
    frozen.fails = True
    with pytest.raises(ValueError):
        frozen(torch.ones(1))
    frozen.fails = False
    frozen(torch.ones(1))
    assert timer.take() == 2.0


@pytest.mark.parametrize(("layers", "timed"), [(1, 1), (64, 64), (65, 33), (224, 56)])
def test_of_many_layers_some_are_timed_evenly_spread(monkeypatch, layers, timed):
    clock = Clock(monkeypatch)
    model = nn.Sequential(*(Adapted(Frozen(clock)) for _ in range(layers)))
    timer = ForwardTimer(model, torch.device("cpu"))
    model(torch.ones(1))
    assert timer.take() == 2.0 * timed <= 2.0 * MOST_LAYERS
