"""Bytes between nodes, against a count of every message; what is counted where, for Llama-3-8B."""

from fractions import Fraction
from pathlib import Path

import pytest

from trainer.estimate.estimate import Estimator
from trainer.estimate.traffic import Flow

WORLD, PER_NODE = 8, 4


def crossing(size: int, stride: int, ring: bool, per_node: int) -> Fraction:
    """What leaves the first node, counted message by message; 1 is all that one rank sends."""
    total = Fraction(0)
    for rank in range(WORLD):
        block, place = divmod(rank, size * stride)
        group = [block * size * stride + place % stride + i * stride for i in range(size)]
        at = group.index(rank)
        receivers = [group[(at + 1) % size]] if ring else [other for other in group if other != rank]
        for receiver in receivers if size > 1 else []:
            if rank < per_node <= receiver:
                total += Fraction(1, len(receivers))
    return total


@pytest.mark.parametrize("ring", [True, False], ids=["ring", "to all"])
@pytest.mark.parametrize(("size", "stride"), [(1, 1), (2, 1), (4, 1), (8, 1), (2, 2), (4, 2), (2, 4), (8, 1), (1, 8)])
@pytest.mark.parametrize("per_node", [1, 2, 4, 8])
def test_bytes_out_of_a_node_are_those_of_its_messages_to_others(size, stride, ring, per_node):
    assert Flow("", Fraction(1), size, stride, ring).out_of_node(per_node) == crossing(size, stride, ring, per_node)


def between(recipe_of, **changes) -> dict[str, int]:
    recipe = recipe_of("llama-3-8b", train__global_batch_size=3 * WORLD, **changes)
    return Estimator(recipe, "cpu", PER_NODE).estimate(recipe, WORLD).between_nodes


def test_nothing_but_gradients_leaves_a_node_that_has_copies_of_base_and_adapter(recipe_of):
    """Three micro-batches: gathers of each in plain ZeRO-3, and one reduction."""
    plain = between(recipe_of)
    both = between(recipe_of, base__shard_group="node", adapter__shard_group="node")
    assert both["gathers of the base"] == both["gathers of the adapter"] == 0
    whole = plain["gradients"] * WORLD // (WORLD - 1)
    assert plain["gathers of the adapter"] == 6 * plain["gradients"]
    assert both["gradients"] == whole  # each of four ranks sends its quarter to the same place in the other node
    base = between(recipe_of, base__shard_group="node")
    assert base == {**plain, "gathers of the base": 0}


def test_placed_experts_are_gathered_within_a_node_where_copies_are(recipe_of):
    placed = {"experts__parallel_size": 2, "base__shard_group": "node"}
    apart = between(recipe_of, **placed, adapter__shard_group="node")
    assert [name for name, size in apart.items() if size] == ["gradients", "gradients of placed experts"]
    assert between(recipe_of, **placed)["gathers of placed experts"] > 0


def test_a_model_below_stage3_max_live_parameters_is_gathered_once_per_micro_batch(recipe_of, tmp_path):
    text = Path("ds_configs/zero3.json").read_text()
    (tmp_path / "zero3.json").write_text(text.replace('parameters": 1e9', 'parameters": 1e12'))
    plain = between(recipe_of, adapter__shard_group="node")
    once = between(recipe_of, adapter__shard_group="node", deepspeed__config=str(tmp_path / "zero3.json"))
    embedding = 128_256 * 4096 * 2
    assert 2 * once["gathers of the base"] == pytest.approx(
        plain["gathers of the base"] + 3 * embedding * (WORLD - 1) // WORLD, rel=1e-6
    )
