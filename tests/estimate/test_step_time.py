"""Seconds of a step: operations against torch's own count, links against sums by hand."""

from fractions import Fraction

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from data_prep.user_error import UserError
from trainer.base.model_config import parse_config_alone
from trainer.estimate.estimate import Estimator
from trainer.estimate.estimate_report import place_ranks
from trainer.estimate.rank_model import build_rank_model, groups_without_ranks
from trainer.estimate.step_time import Hardware, hardware, step_flops, step_time
from trainer.estimate.suggest import Change, suggest_faster
from trainer.estimate.traffic import Flow
from trainer.objective.batches import BatchPlan


def small_model(recipe):
    config = parse_config_alone(recipe.base)
    config.num_hidden_layers, config.hidden_size, config.intermediate_size, config.vocab_size = 4, 1024, 2048, 1000
    config.num_attention_heads = config.num_key_value_heads = 8
    rank_model = build_rank_model(config, recipe, groups_without_ranks(recipe.experts, 1, 1), by_layer=False)
    rank_model.model.to_empty(device="cpu")
    return rank_model


@pytest.mark.parametrize("method", ["teamlora", "hydralora"])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["kept", "recomputed"])
def test_operations_are_those_that_torch_counts(recipe_of, method, checkpointing):
    """Rows are short: torch does not count attention on a CPU."""
    changes = {"adapter__method": method, "train__micro_batch_size": 1, "train__global_batch_size": 1}
    changes["data__seq_len"] = 64
    recipe = recipe_of(
        "llama-3-8b", base__quantization="none", train__activation_checkpointing=checkpointing, **changes
    )
    found = small_model(recipe)
    if checkpointing:
        found.model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    ids = torch.zeros(1, recipe.data.seq_len, dtype=torch.long)
    with FlopCounterMode(display=False) as counter:
        found.model.train()(input_ids=ids, use_cache=False).logits.sum().backward()
    expected = step_flops(found, recipe, BatchPlan(1, 1, 1))
    if not checkpointing:  # nothing in front of the first adapter has a backward, nor what the same input goes to
        expected -= 2 * 64 * (4 * 1024**2 + 2 * 1024 * 2048)
    assert counter.get_total_flops() == pytest.approx(expected, rel=0.02)


def test_operations_grow_with_the_batch_and_shrink_with_the_ranks(recipe_of):
    small, large = (recipe_of("llama-3-8b", train__global_batch_size=n) for n in (16, 32))
    estimate = Estimator(small, "cuda").estimate
    assert estimate(large, 4).flops == 2 * estimate(small, 4).flops == 4 * estimate(small, 8).flops


def test_what_overlaps_hides_behind_arithmetic_and_the_rest_does_not():
    """Two nodes of two ranks: 10 bytes of a ring leave each node at 1 byte per second, and go to a neighbor at 10."""
    ring = Flow("gathers", Fraction(10), 4)
    after = Flow("gradients", Fraction(20), 4, overlaps=False)
    time = step_time(700.0, [ring, after], 2, Hardware(100.0, inside=10.0, between=1.0))
    assert (time.arithmetic, time.inside, time.between) == (7.0, 3.0, 30.0)
    assert time.step == 10.0 + 20.0
    assert time.bound_by == "the link between nodes"
    alone = step_time(700.0, [ring, after], 4, Hardware(100.0, inside=10.0, between=1.0))
    assert (alone.between, alone.step, alone.bound_by) == (0.0, 7.0 + 2.0, "arithmetic")


def test_of_what_goes_to_all_others_a_rank_sends_its_neighbors_their_share():
    to_all = Flow("", Fraction(30), 4, ring=False)
    assert to_all.inside_node(2) == 10
    assert to_all.inside_node(4) == 30
    assert Flow("", Fraction(30), 2, stride=2).inside_node(2) == 0


def test_a_group_in_each_node_is_found_to_be_faster_on_a_slow_link_and_nothing_where_there_is_no_link(recipe_of):
    recipe = recipe_of("llama-3-8b", train__global_batch_size=64)
    speeds = Hardware(66e12, 31.5e9, 1e9 / 8)
    estimator = Estimator(recipe, "cuda", 4)
    given = estimator.estimate(recipe, 8)
    found = suggest_faster(estimator, given, speeds, None, None)
    assert "base.shard_group=node" in found[0].settings
    times = [each.estimate.step_time(speeds).step for each in found]
    assert all(time * 1.05 < given.step_time(speeds).step for time in times)
    assert times[0] == min(times)
    assert suggest_faster(Estimator(recipe, "cuda"), given, Hardware(66e12), None, None) == []
    small = given.device - 1  # nothing that needs more memory than what was given
    assert all(each.estimate.device <= small for each in suggest_faster(estimator, given, speeds, small, None))


def test_gradients_of_one_micro_batch_overlap_and_those_of_several_do_not(recipe_of):
    for batch, overlaps in ((8, True), (16, False)):
        recipe = recipe_of("llama-3-8b", train__global_batch_size=batch, train__micro_batch_size=1)
        flows = Estimator(recipe, "cuda").estimate(recipe, 8).flows
        assert [flow.overlaps for flow in flows if flow.purpose == "gradients"] == [overlaps]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ((None, None, None), (1, 1)),
        ((16, None, None), (16, 1)),
        ((16, 2, None), (16, 2)),
        ((None, 2, 8), (16, 2)),
        ((16, None, 8), (16, 2)),
        ((None, None, 8), (8, 1)),
    ],
)
def test_two_of_ranks_nodes_and_gpus_per_node_give_the_third(given, expected):
    assert place_ranks(*given) == expected


@pytest.mark.parametrize(
    ("given", "words"),
    [((16, 3, None), "--nodes 3 does not divide"), ((16, 2, 4), "--gpus-per-node 4"), ((12, None, 8), "--gpus-per")],
)
def test_ranks_that_do_not_come_out_are_refused(given, words):
    with pytest.raises(UserError, match=words):
        place_ranks(*given)


def test_speeds_come_from_a_name_or_from_what_was_measured():
    assert hardware(None, None, None) is None
    assert hardware("H100", None, 50e9) == Hardware(0.4 * 989e12, 450e9, 50e9, 79 * 2**30)
    assert hardware("h100", 500.0, None) == Hardware(500e12, 450e9, None, 79 * 2**30)
    assert hardware(None, 100.0, 1e9) == Hardware(100e12, None, 1e9)
    with pytest.raises(UserError, match="--gpu k80: not known here; use one of b200, "):
        hardware("k80", None, None)
    with pytest.raises(UserError, match="--link: times need"):
        hardware(None, None, 1e9)


def test_a_setting_that_is_changed_twice_is_named_once(recipe_of):
    start = Change(recipe_of("llama-3-8b"), 8, ())
    twice = start.set("base", "shard_group", "node").set("train", "micro_batch_size", 2).set("base", "shard_group", 1)
    assert twice.settings == ("train.micro_batch_size=2", "base.shard_group=1")
