"""`teamlora estimate`: what it prints, what it suggests, what it refuses."""

import json
from pathlib import Path

import pytest

from trainer.cli import main
from trainer.console.arguments import memory_size
from trainer.estimate.estimate import Estimator
from trainer.estimate.estimate_report import GIB
from trainer.estimate.resident import LIBRARIES
from trainer.recipe_file import dump_recipe, load_recipe


@pytest.fixture
def path(tmp_path, recipe_of):
    path = tmp_path / "recipe.yaml"
    recipe = recipe_of("llama-3-8b", train__micro_batch_size=4, train__global_batch_size=64, data__seq_len=2048)
    path.write_text(dump_recipe(recipe))
    return path


def estimate_json(capsys, *arguments):
    """The printed JSON object; the exit status agrees with `fits`."""
    status = main(["estimate", *map(str, arguments), "--json"])
    found = json.loads(capsys.readouterr().out)
    assert status == (0 if found["fits"] else 2)
    return found


def test_the_terms_in_json_add_up_to_the_peak(path, capsys):
    found = estimate_json(capsys, path, "--world-size", "2")
    resident = sum(use["device"] for use in found["resident"].values())
    assert found["peak"]["device"] == resident + sum(found["transient"].values())
    assert found["fits"] and found["would_fit"] == []
    moments = found["resident"]["optimizer moments"]["device"]
    assert found["trained_parameters"] * 8 == pytest.approx(2 * moments, rel=1e-3)  # AdamW's two in fp32, on two ranks


def test_the_table_names_every_category_and_the_limit(path, capsys):
    assert main(["estimate", str(path), "--gpu-memory", "900GiB"]) == 0
    out = capsys.readouterr().out
    for word in ("packed weights", "optimizer moments", "activations", "peak", "sent per rank", "fits", "900.00 GiB"):
        assert word in out


@pytest.mark.parametrize("limit", ["40GiB", "24GiB", "16GiB"])
def test_suggestions_fit_when_estimated_again(path, capsys, limit):
    found = estimate_json(capsys, path, "--world-size", "2", "--gpu-memory", limit)
    assert not found["fits"] and found["would_fit"]
    for suggestion in found["would_fit"]:
        overrides = [setting for setting in suggestion["settings"] if "=" in setting]
        worlds = [int(setting.split()[1]) for setting in suggestion["settings"] if setting.startswith("--world-size")]
        recipe = load_recipe(path, overrides)
        estimate = Estimator(recipe, "cuda").estimate(recipe, (worlds or [2])[0])
        assert estimate.device == suggestion["device"] <= memory_size(limit)


def test_a_run_that_already_recomputes_may_fit_with_its_inputs_on_the_host(path, capsys):
    recomputing = ["train.activation_checkpointing=true", "train.micro_batch_size=1"]
    needed = estimate_json(capsys, path, *recomputing, "--gpu-memory", "900GiB")["peak"]["device"]
    found = estimate_json(capsys, path, *recomputing, "--gpu-memory", f"{needed - 2**20}B")
    assert found["would_fit"][0]["settings"] == ["train.activation_checkpointing=offload"]
    assert found["would_fit"][0]["device"] == needed - (32 - 3) * 2048 * 4096 * 2  # Llama-3-8B in bf16


def test_a_run_that_no_change_makes_fit_is_reported(path, capsys):
    assert main(["estimate", str(path), "--gpu-memory", "10MiB"]) == 2
    printed = capsys.readouterr()
    assert "none of the changes tried would fit" in printed.out
    assert printed.err.startswith("error: does not fit: device ") and printed.err.count("\n") == 1


def test_a_run_that_does_not_fit_is_an_error_that_names_the_nearest_change(path, capsys):
    assert main(["estimate", str(path), "--world-size", "2", "--gpu-memory", "40GiB", "--host-memory", "9GiB"]) == 2
    printed = capsys.readouterr()
    assert "does not fit    device" in printed.out and "would fit" in printed.out
    assert printed.err.startswith("error: does not fit: device ") and "of 40.00 GiB; it would fit with " in printed.err
    assert "host" not in printed.err and printed.err.count("\n") == 1


def test_a_deepspeed_file_that_training_refuses_is_refused(path, tmp_path, capsys):
    config = json.loads(Path("ds_configs/zero3.json").read_text())
    config["zero_optimization"]["zero_hpz_partition_size"] = 2
    (tmp_path / "hpz.json").write_text(json.dumps(config))
    assert main(["estimate", str(path), f"deepspeed.config={tmp_path / 'hpz.json'}"]) == 2
    assert "zero_hpz_partition_size=2 corrupts a packed base" in capsys.readouterr().err


def test_giving_gpu_memory_estimates_for_a_gpu(path, capsys):
    found = estimate_json(capsys, path, "--gpu-memory", "900GiB")
    assert found["device_kind"] == "cuda" and found["peak"] == found["peak_on"]["cuda"]


def test_json_reports_the_peak_on_each_kind_of_device(path, capsys):
    found = estimate_json(capsys, path, "deepspeed.config=ds_configs/zero2.json")  # buckets of the same size on both
    on = found["peak_on"]
    assert on["cuda"]["device"] - on["cpu"]["device"] == LIBRARIES["cuda"] - LIBRARIES["cpu"]
    assert on["cuda"]["host"] == on["cpu"]["host"]


@pytest.mark.parametrize(
    ("world", "groups"), [(2, 0), (4, 2)], ids=["of all ranks, which every run has", "with replicas"]
)
def test_groups_of_placed_experts_take_memory_of_their_own_on_gpus(path, capsys, world, groups):
    options = ["--world-size", str(world), "experts.parallel_size=2"]
    on_gpu = estimate_json(capsys, path, "--gpu-memory", "900GiB", *options)["resident"]
    assert on_gpu["expert groups"]["device"] == groups * 128 * 2**20
    assert estimate_json(capsys, path, *options)["resident"]["expert groups"]["device"] == 0


def test_offload_moves_bytes_to_the_host(path, capsys):
    on_device = estimate_json(capsys, path)["peak"]
    found = estimate_json(capsys, path, "deepspeed.config=ds_configs/zero3_offload.json", "--host-memory", "1GiB")
    assert on_device["host"] < 4 * GIB
    assert found["peak"]["host"] > 4 * GIB and found["peak"]["device"] < on_device["device"]
    assert not found["fits"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--world-size", "4", "--nodes", "3"], "--nodes 3 does not divide --world-size 4"),
        (["--world-size", "4", "base.shard_group=3"], "base.shard_group=3 does not divide the 4 ranks"),
        (["--world-size", "3"], "train.global_batch_size=64 is not divisible by"),
        (["base.model=nowhere/at/all"], "nowhere/at/all does not exist"),
        (["adapter.target_modules=[nothing]"], "'nothing' matches no linear layer"),
        (["deepspeed.config=none.json"], "deepspeed.config=none.json"),
        (["experts.parallel_size=2"], "does not divide the 1 ranks"),
    ],
)
def test_a_mistake_is_one_line_and_status_2(path, capsys, arguments, message):
    assert main(["estimate", str(path), *arguments]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and message in err and err.count("\n") == 1


@pytest.mark.parametrize("size", ["24", "much", "0GB"])
def test_a_limit_without_a_unit_is_refused(path, capsys, size):
    with pytest.raises(SystemExit) as ended:
        main(["estimate", str(path), "--gpu-memory", size])
    assert ended.value.code == 2
    assert "expected an amount of memory such as 24GiB" in capsys.readouterr().err


def test_times_of_a_step_and_faster_settings_are_printed_for_a_gpu_and_a_link(path, capsys):
    words = ["estimate", str(path), "--nodes", "2", "--gpus-per-node", "4", "--gpu", "h100", "--link", "1Gbit"]
    assert main(words) == 0
    out = capsys.readouterr().out
    assert "of 79.00 GiB" in out  # what such a GPU has
    for word in (
        "arithmetic",
        "link between nodes",
        "step",
        "tokens/s, bound by the link between nodes (",
        "396 TFLOPS",
    ):
        assert word in out
    assert "faster          base.shard_group=node" in out


def test_a_faster_setting_takes_as_long_when_it_is_estimated_itself(path, capsys):
    where = ["--nodes", "2", "--gpus-per-node", "4", "--tflops", "66", "--link", "1Gbit"]
    found = estimate_json(capsys, path, *where)["time_of_a_step"]
    assert found["step"] == pytest.approx(
        max(found["arithmetic"], found["between"] - found["exposed"]) + found["exposed"]
    )
    best = found["faster"][0]
    again = estimate_json(capsys, path, *best["settings"], *where)["time_of_a_step"]
    assert again["step"] == best["step"] < found["step"]
    assert "time_of_a_step" not in estimate_json(capsys, path, "--world-size", "2")
