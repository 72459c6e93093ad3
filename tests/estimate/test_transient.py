"""What comes and goes in a step, against closed forms for Llama-3-8B in bf16."""

import pytest

from trainer.estimate.estimate import Estimator

TOKENS, VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, NARROW = 2 * 512, 128_256, 4096, 14336, 32, 1024
WORLD = 4


@pytest.fixture
def transient(recipe_of):
    def make(world=WORLD, **changes):
        rows = {"train__micro_batch_size": 2, "train__global_batch_size": 2 * WORLD}
        recipe = recipe_of("llama-3-8b", **rows, **changes)
        return Estimator(recipe).estimate(recipe, world).transient

    return make


def test_logits_stand_three_times_in_fp32_and_twice_in_bf16(transient):
    assert transient().logits == TOKENS * VOCABULARY * 16


def test_a_layer_and_the_head_are_gathered_whole_and_only_where_they_are_sharded(transient):
    linears = HIDDEN * (2 * HIDDEN + 2 * NARROW + 3 * INTERMEDIATE)
    adapter = 3 * (16 * (HIDDEN + INTERMEDIATE) + 16) + 4 * (2 * HIDDEN + INTERMEDIATE)
    found = transient()
    assert found.gathered_layer == linears // 2 + linears // 64 + 2 * (2 * HIDDEN + adapter)
    assert found.gathered_head == 2 * VOCABULARY * HIDDEN
    alone = transient(world=1)
    assert (alone.gathered_layer, alone.gathered_head, alone.prefetch) == (0, 0, 0)


def test_the_largest_weight_is_dequantised_in_the_compute_dtype(transient):
    largest = HIDDEN * INTERMEDIATE
    gradients = TOKENS * 2 * 2 * (HIDDEN + INTERMEDIATE)
    assert transient().working == 2 * largest + 4 * largest // 64 + gradients
    assert transient(base__quantization="none").working == gradients


def test_checkpointing_keeps_each_layers_input_and_one_layer_again(transient):
    full, slim = transient(), transient(train__activation_checkpointing=True)
    assert slim.activations == LAYERS * 2 * TOKENS * HIDDEN
    assert 8 * slim.activations < full.activations
    assert full.recomputed == 0 and full.activations / LAYERS == pytest.approx(slim.recomputed, rel=0.05)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_the_named_terms_add_up_to_the_peak(transient, checkpointing):
    found = transient(train__activation_checkpointing=checkpointing)
    assert sum(found.by_name.values()) == found.peak
