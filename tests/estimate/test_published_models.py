"""Estimates for models of known size, from config.json alone, against closed forms."""

import math
import time

import pytest

from trainer.estimate.estimate import Estimator

# name: (published number of parameters, hidden, intermediate, layers, key/value width)
MODELS = {
    "llama-3-8b": (8_030_261_248, 4096, 14336, 32, 1024),
    "llama-3-70b": (70_553_706_496, 8192, 28672, 80, 1024),
    "llama-3.1-405b": (405_853_388_800, 16384, 53248, 126, 1024),
}
VOCABULARY, WORLD = 128_256, 8
models = pytest.mark.parametrize("name", MODELS)


def device_bytes(recipe, world):
    return {use.name: use.device for use in Estimator(recipe).estimate(recipe, world).resident}


@models
def test_unquantised_parameters_match_the_published_count(recipe_of, name):
    recipe = recipe_of(name, base__quantization="none", train__global_batch_size=WORLD)
    published = MODELS[name][0]
    assert device_bytes(recipe, 1)["unquantised"] == 2 * published
    assert device_bytes(recipe, WORLD)["unquantised"] == 2 * published // WORLD


@models
def test_packed_weights_take_half_a_byte_each_plus_one_byte_per_64_for_maxima(recipe_of, name):
    published, hidden, _, layers, _ = MODELS[name]
    plain = 2 * VOCABULARY * hidden + (2 * layers + 1) * hidden
    found = device_bytes(recipe_of(name, train__global_batch_size=WORLD), WORLD)
    assert found["packed weights"] == (published - plain) // 2 // WORLD
    assert found["absmax"] == (published - plain) // 64 // WORLD
    assert found["unquantised"] == 2 * plain // WORLD


@models
def test_adapter_and_its_state_follow_teamloras_shapes(recipe_of, name):
    _, hidden, intermediate, layers, _ = MODELS[name]
    k, rank = 4, 4
    sides = [(hidden, intermediate), (hidden, intermediate), (intermediate, hidden)]
    elements = layers * sum(k * rank * d_in + k * d_in + k * k + k * rank * d_out for d_in, d_out in sides)
    found = device_bytes(recipe_of(name), 1)
    assert found["adapter"] == found["gradients"] == 2 * elements
    assert (found["master copy"], found["optimizer moments"]) == (4 * elements, 8 * elements)


def test_placed_experts_are_cut_over_replicas_and_whole_with_replicate(recipe_of):
    _, hidden, intermediate, layers, _ = MODELS["llama-3-8b"]
    experts = 2 * layers * 16 * (2 * intermediate + hidden)  # bytes of all B in bf16
    whole = device_bytes(recipe_of("llama-3-8b"), 1)["adapter"]
    shared = whole - experts
    placed = {"experts__parallel_size": 2, "train__global_batch_size": WORLD}
    cut = device_bytes(recipe_of("llama-3-8b", **placed), WORLD)["adapter"]
    replicated = device_bytes(recipe_of("llama-3-8b", **placed, experts__replicate=True), WORLD)["adapter"]
    assert cut == (shared + experts) // WORLD
    assert replicated == shared // WORLD + experts // 2


def test_8bit_moments_take_one_byte_each_plus_one_maximum_per_block(recipe_of):
    found = device_bytes(recipe_of("llama-3-8b", train__optimizer="adamw_8bit"), 1)
    elements = found["master copy"] // 4
    assert found["optimizer moments"] == 2 * (elements + 4 * math.ceil(elements / 256))


@pytest.mark.parametrize(("stage", "world", "share"), [(0, 2, 1), (2, 2, 2), (3, 1, 1), (3, 2, 2)])
@pytest.mark.parametrize(("optimizer", "size"), [("adamw", 12), ("adamw_8bit", 20)])
def test_the_checkpoint_copy_is_on_the_host_whole_or_sharded(recipe_of, stage, world, share, optimizer, size):
    config = f"ds_configs/zero{stage}.json" if stage else "ds_configs/single.json"
    recipe = recipe_of("llama-3-8b", deepspeed__config=config, train__optimizer=optimizer)
    found = Estimator(recipe).estimate(recipe, world)
    (row,) = (use for use in found.resident if use.name == "checkpoint copy")
    expected = pytest.approx(size * found.trained / share, rel=1e-4)  # stage 0 keeps small tensors in fp32
    assert (row.device, row.host) == (0, expected)


@pytest.mark.parametrize(("kind", "elements"), [("cuda", 50_000_000), ("cpu", None)])
def test_the_reduce_bucket_is_allocated_whole_on_a_gpu_and_as_far_as_used_on_a_cpu(recipe_of, kind, elements):
    recipe = recipe_of("llama-3-8b", adapter__expert_rank=1, train__global_batch_size=WORLD)
    rows = {use.name: use.device for use in Estimator(recipe, kind).estimate(recipe, WORLD).resident}
    assert rows["reduce bucket"] == (2 * elements if elements else rows["adapter"] * WORLD)


@pytest.mark.parametrize(("world", "copies"), [(1, 2), (64, None)])
def test_the_loading_peak_is_the_whole_adapter_or_its_shard_twice_and_its_master_copy(recipe_of, world, copies):
    recipe = recipe_of("llama-3-8b", train__global_batch_size=world)
    found = Estimator(recipe, "cpu").estimate(recipe, world)
    rows = {use.name: use.device for use in found.resident}
    base = ("packed weights", "absmax", "absmax, second level", "unquantised", "buffers", "libraries")
    learning = copies * rows["adapter"] + rows["master copy"] if copies else world * rows["adapter"]
    rest = found.loading.device - sum(rows[name] for name in base)
    assert rest == pytest.approx(learning, rel=1e-3)  # shards are padded


@pytest.mark.parametrize(("dispatch", "tokens"), [("auto", 512), ("weights", 0)])
def test_autotuning_exchanges_outputs_of_512_tokens(recipe_of, dispatch, tokens):
    recipe = recipe_of("llama-3-8b", adapter__expert_rank=1, experts__parallel_size=2, experts__dispatch=dispatch)
    recipe = recipe.model_copy(update={"train": recipe.train.model_copy(update={"global_batch_size": 2})})
    found = Estimator(recipe, "cpu").estimate(recipe, 2)
    rows = {use.name: use.device for use in found.resident}
    rest = found.loading.device - sum(rows.values()) + rows["gradients"] + rows["optimizer moments"]
    assert rest + rows["reduce bucket"] == max(rows["adapter"], 7 * tokens * 14336 * 2)


def test_zero3_gathers_each_weight_twice_and_the_embedding_once(recipe_of):
    recipe = recipe_of("llama-3-8b", base__quantization="none", train__global_batch_size=2 * WORLD)
    estimate = Estimator(recipe).estimate(recipe, WORLD)
    published, hidden, *_ = MODELS["llama-3-8b"]
    a_pass = 2 * (2 * published - VOCABULARY * hidden) * (WORLD - 1) // WORLD
    assert estimate.sent["gathers of the base"] == 2 * a_pass  # two micro-batches
    adapter = {use.name: use.device for use in estimate.resident}["adapter"] * (WORLD - 1)
    assert estimate.sent["gathers of the adapter"] == 4 * adapter
    assert estimate.sent["gradients"] == adapter  # once a step


def test_a_group_of_ranks_keeps_and_gathers_a_base_of_its_own(recipe_of):
    """Two nodes of half the ranks each."""
    per_node = WORLD // 2
    plain = recipe_of("llama-3-8b", train__global_batch_size=WORLD)
    found = {}
    for group in ("world", "node", per_node, 1):
        base = plain.base.model_copy(update={"shard_group": group})
        estimate = Estimator(plain, ranks_per_node=per_node).estimate(plain.model_copy(update={"base": base}), WORLD)
        packed = next(use.device for use in estimate.resident if use.name == "packed weights")
        found[group] = (packed, estimate.sent["gathers of the base"], estimate.sent["gradients"])
    (packed, gathers, gradients), (whole, nothing, same) = found["world"], found[1]
    assert (
        found["node"]
        == found[per_node]
        == (2 * packed, gathers * (per_node - 1) * WORLD // ((WORLD - 1) * per_node), gradients)
    )
    assert (whole, nothing, same) == (WORLD * packed, 0, gradients)


def test_copies_of_the_adapter_keep_gathers_and_most_of_a_reduction_within_a_group(recipe_of):
    """Two groups of half the ranks; whole on each rank, all is left to the sum over copies."""
    recipe = recipe_of("llama-3-8b", train__global_batch_size=WORLD)
    found = {}
    for group in (WORLD, WORLD // 2, 1):
        adapter = recipe.adapter.model_copy(update={"shard_group": group})
        estimate = Estimator(recipe).estimate(recipe.model_copy(update={"adapter": adapter}), WORLD)
        resident = {use.name: use.device for use in estimate.resident}
        found[group] = resident["adapter"], estimate.sent["gathers of the adapter"], estimate.sent["gradients"]
    whole = found[1][0]
    assert found[WORLD] == (whole // WORLD, 2 * whole * (WORLD - 1) // WORLD, whole * (WORLD - 1) // WORLD)
    half = WORLD // 2
    within = whole * (half - 1) // half
    assert found[half] == (whole // half, 2 * within, 2 * within + whole // half)  # a sum of two sends each part once
    assert found[1] == (whole, 0, 2 * whole * (WORLD - 1) // WORLD)


def test_405b_on_64_ranks_is_estimated_in_seconds(recipe_of):
    recipe = recipe_of("llama-3.1-405b", train__global_batch_size=64, data__seq_len=4096)
    began = time.process_time()
    Estimator(recipe).estimate(recipe, 64)
    assert time.process_time() - began < 10
