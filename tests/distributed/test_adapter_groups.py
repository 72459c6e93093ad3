"""Which ranks divide what learns among them, which have the same parts, and how many process groups that takes."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from trainer.distributed.adapter_groups import AdapterGroups, make_adapter_groups
from trainer.estimate.rank_model import groups_without_ranks
from trainer.recipe import ExpertsConfig


@contextmanager
def this_as(rank: int, world: int) -> Iterator[None]:
    dist.init_process_group("fake", rank=rank, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def members(groups: AdapterGroups) -> list[list[int] | None]:
    parts = [part for division in (groups.experts, groups.shared) for part in (division.among, division.copies)]
    return [sorted(dist.get_process_group_ranks(g)) if g is not None else None for g in (groups.parallel, *parts)]


EVERYONE = list(range(8))


# expected: ranks of parallel, experts.among, experts.copies, shared.among, shared.copies; made: process groups
@pytest.mark.parametrize(
    ("size", "replicate", "shard_group", "expected", "made"),
    [
        (1, False, 8, [[5], EVERYONE, None, EVERYONE, None], 1),
        (2, False, 8, [[4, 5], [1, 3, 5, 7], None, EVERYONE, None], 2),
        (8, False, 8, [EVERYONE, [5], None, EVERYONE, None], 1),
        (2, True, 8, [[4, 5], [5], [1, 3, 5, 7], EVERYONE, None], 3),
        (1, False, 4, [[5], [4, 5, 6, 7], [1, 5], [4, 5, 6, 7], [1, 5]], 3),
        (2, False, 4, [[4, 5], [5, 7], [1, 5], [4, 5, 6, 7], [1, 5]], 4),
        (4, False, 4, [[4, 5, 6, 7], [5], [1, 5], [4, 5, 6, 7], [1, 5]], 3),
        (2, True, 4, [[4, 5], [5], [1, 3, 5, 7], [4, 5, 6, 7], [1, 5]], 5),
        (1, False, 1, [[5], [5], EVERYONE, [5], EVERYONE], 1),
    ],
)
def test_groups_of_rank_5_of_8(monkeypatch, size, replicate, shard_group, expected, made):
    """Each group costs buffers on every GPU: none is made twice."""
    calls = []
    experts = ExpertsConfig(parallel_size=size, replicate=replicate, dispatch="weights")
    with this_as(5, world=8):
        monkeypatch.setattr(dist, "new_subgroups_by_enumeration", counted(dist.new_subgroups_by_enumeration, calls))
        groups = make_adapter_groups(experts, shard_group)
        assert members(groups) == expected
        assert groups.hosts is groups.parallel
        assert len(calls) == made
    without = groups_without_ranks(experts, 8, shard_group)
    parts = [part for division in (without.experts, without.shared) for part in (division.among, division.copies)]
    sizes = [g.size() if g is not None else None for g in (without.parallel, *parts)]
    assert sizes == [len(ranks) if ranks is not None else None for ranks in expected]
    assert (without.experts.ranks, without.shared.ranks) == (8 // size, 8)


def counted(make: Callable, calls: list) -> Callable:
    def counting(lists: list[list[int]]) -> object:
        calls.append(lists)
        return make(lists)

    return counting


@pytest.mark.parametrize(("dispatch", "over_gloo"), [("weights", 0), ("auto", 1), ("tokens", 1)])
def test_where_tokens_may_travel_hosts_have_a_group_over_gloo_beside_nccls(monkeypatch, dispatch, over_gloo):
    made = []
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    monkeypatch.setattr(dist, "new_subgroups", lambda size, backend: (made.append((size, backend)), None))
    with this_as(0, world=4):
        make_adapter_groups(ExpertsConfig(parallel_size=2, dispatch=dispatch), 4)
    assert made == [(2, "gloo")] * over_gloo


def test_none_is_made_for_hosts_without_placement(monkeypatch):
    monkeypatch.setattr(dist, "get_backend", lambda group: "nccl")
    with this_as(0, world=4):
        groups = make_adapter_groups(ExpertsConfig(), 2)
        assert groups.hosts is groups.parallel and groups.size == 1
