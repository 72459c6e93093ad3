"""Memory that is held for part of a step only, against closed forms for Llama-3-8B in bf16."""

import json
from pathlib import Path

import pytest

from trainer.estimate.estimate import Estimator

TOKENS, VOCABULARY, HIDDEN, INTERMEDIATE, LAYERS, NARROW = 2 * 512, 128_256, 4096, 14336, 32, 1024
WORLD = 4


@pytest.fixture
def estimate(recipe_of):
    def make(world=WORLD, **changes):
        rows = {"train__micro_batch_size": 2, "train__global_batch_size": 2 * WORLD}
        recipe = recipe_of("llama-3-8b", **rows, **changes)
        return Estimator(recipe).estimate(recipe, world)

    return make


@pytest.fixture
def transient(estimate):
    return lambda world=WORLD, **changes: estimate(world, **changes).transient


def test_logits_are_held_three_times_in_fp32_and_twice_in_bf16(transient):
    assert transient(train__loss_chunk=0).logits == TOKENS * VOCABULARY * 16


def test_of_logits_a_chunk_is_held_beside_the_gradients_of_all_hidden_states(transient):
    gradients = TOKENS * HIDDEN * 2
    assert transient(train__loss_chunk=100).logits == 100 * VOCABULARY * 16 + gradients
    assert transient().logits == 2**26 // (4 * VOCABULARY) * VOCABULARY * 16 + gradients
    assert transient(train__loss_chunk=TOKENS).logits == TOKENS * VOCABULARY * 16


def test_rows_are_padded_to_64_tokens_on_gpus_only(recipe_of):
    batch = {"train__micro_batch_size": 2, "train__loss_chunk": 0}
    recipe, full = (recipe_of("llama-3-8b", data__seq_len=length, **batch) for length in (450, 512))
    on_gpu, on_cpu = (Estimator(recipe).estimate(recipe, 1, kind) for kind in ("cuda", "cpu"))
    whole = Estimator(full).estimate(full, 1, "cuda")
    assert (on_gpu.transient.logits, on_cpu.transient.logits) == (TOKENS * VOCABULARY * 16, 900 * VOCABULARY * 16)
    assert on_gpu.transient == whole.transient and on_cpu.transient.activations < whole.transient.activations
    assert on_gpu.recipe.data.seq_len == 450


LINEARS = HIDDEN * (2 * HIDDEN + 2 * NARROW + 3 * INTERMEDIATE)  # elements of a layer's
ADAPTER = 3 * (16 * (HIDDEN + INTERMEDIATE) + 16) + 4 * (2 * HIDDEN + INTERMEDIATE)
PACKED = LINEARS // 2 + LINEARS // 64
FROZEN = PACKED + 2 * 2 * HIDDEN  # bytes of a layer without its adapters, which are not gathered by ZeRO-3
HEAD = 2 * VOCABULARY * HIDDEN


def config_with(folder, **zero):
    """ds_configs/zero3.json with some values replaced."""
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"] |= zero
    (folder / "zero3.json").write_text(json.dumps(config))
    return {"deepspeed__config": str(folder / "zero3.json")}


@pytest.mark.parametrize(
    ("world", "changes", "held"),
    [
        (WORLD, {}, 0),
        (WORLD // 2, {}, 4 * LAYERS * ADAPTER),
        (WORLD // 2, {"base__dtype": "fp32"}, 4 * LAYERS * ADAPTER),
        (WORLD // 2, {"deepspeed__config": "ds_configs/single.json"}, 4 * LAYERS * ADAPTER),
        (WORLD // 2, {"deepspeed__config": "ds_configs/single.json", "base__dtype": "fp32"}, 0),
    ],
    ids=[
        "one micro-batch",
        "two",
        "in fp32",
        "in bf16 without ZeRO",
        "in fp32 without ZeRO, where they are kept anyway",
    ],
)
def test_gradients_of_several_micro_batches_are_held_whole_in_fp32(transient, world, changes, held):
    assert transient(world, **changes).accumulated == held


def test_nothing_is_gathered_on_a_single_rank(transient):
    alone = transient(world=1)
    assert (alone.gathered, alone.arriving, alone.placed) == (0, 0, 0)


def test_a_model_below_the_live_parameter_limit_is_gathered_whole(transient, tmp_path):
    roomy = config_with(tmp_path, stage3_max_live_parameters=10**11)
    whole = LAYERS * FROZEN + 2 * HIDDEN + HEAD
    assert transient(**roomy).gathered == whole
    # checkpointing makes the embedding's output require a gradient, so backward needs the embedding as well
    assert transient(**roomy, train__activation_checkpointing=True).gathered == whole + HEAD


def test_a_model_above_the_live_parameter_limit_is_gathered_up_to_it(transient, tmp_path):
    elements = LAYERS * (PACKED + 2 * HIDDEN) + HIDDEN + HEAD // 2
    size = LAYERS * FROZEN + 2 * HIDDEN + HEAD
    live = 10**9
    assert transient(**config_with(tmp_path, stage3_max_live_parameters=live)).gathered == pytest.approx(
        size * live / elements + HEAD
    )


def test_without_prefetch_one_layer_and_the_head_are_gathered(transient, tmp_path):
    assert transient(**config_with(tmp_path, stage3_prefetch_bucket_size=0)).gathered == FROZEN + HEAD


def test_autograd_keeps_plain_linears_whole_without_checkpointing(transient, tmp_path):
    plain = {"base__quantization": "none", **config_with(tmp_path, stage3_prefetch_bucket_size=0)}
    layer = 2 * (LINEARS + 2 * HIDDEN)
    assert transient(**plain).gathered == layer + HEAD + LAYERS * 2 * LINEARS
    assert transient(**plain, train__activation_checkpointing=True).gathered == layer + HEAD


def test_the_largest_parameter_arrives_beside_its_copy(transient):
    assert transient().arriving == HEAD


def test_placed_adapters_of_two_layers_are_gathered(transient):
    assert transient(experts__parallel_size=2).placed == 2 * 2 * ADAPTER


def test_the_optimizer_step_holds_an_fp32_gradient_and_two_adamw_temporaries(transient):
    assert transient().step == LAYERS * ADAPTER // WORLD * 3 * 4
    assert transient(base__dtype="fp32").step == LAYERS * ADAPTER // WORLD * 2 * 4
    assert transient(train__optimizer="adamw_8bit").step == LAYERS * ADAPTER // WORLD * 4


def test_the_largest_weight_is_dequantised_in_the_compute_dtype(transient):
    largest = HIDDEN * INTERMEDIATE
    gradients = TOKENS * 2 * 2 * (HIDDEN + INTERMEDIATE)
    assert transient().working == 2 * largest + 4 * largest // 64 + gradients
    assert transient(base__quantization="none").working == gradients


def test_checkpointing_keeps_each_layers_input_and_recomputes_one_layer(transient):
    full, slim = transient(), transient(train__activation_checkpointing=True)
    rotary, mask, positions = 2 * 2 * TOKENS * 128, TOKENS * 512, 8 * TOKENS
    assert slim.activations == LAYERS * 2 * TOKENS * HIDDEN + rotary + mask + positions
    assert 8 * slim.activations < full.activations
    assert full.recomputed == 0 and full.activations / LAYERS == pytest.approx(slim.recomputed, rel=0.05)


def test_offload_leaves_three_layers_inputs_on_the_device_and_all_but_the_last_on_the_host(estimate):
    recomputed, offloaded = (estimate(train__activation_checkpointing=value) for value in (True, "offload"))
    hidden = 2 * TOKENS * HIDDEN
    assert recomputed.transient.activations - offloaded.transient.activations == (LAYERS - 3) * hidden
    assert recomputed.device - offloaded.device == (LAYERS - 3) * hidden
    assert offloaded.host - recomputed.host == (LAYERS - 1) * hidden
    assert offloaded.transient.recomputed == recomputed.transient.recomputed > 0


@pytest.mark.parametrize("checkpointing", [False, True, "offload"])
def test_the_named_terms_add_up_to_the_peak(transient, checkpointing):
    estimate = transient(train__activation_checkpointing=checkpointing)
    assert sum(estimate.by_name.values()) == estimate.peak
