"""The whole way by the real commands: prepare, train under each launcher, generate, evaluate."""

import json
import math
import os
import shutil

import pytest
import yaml
from safetensors.torch import load_file, save_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.workplace import SCRIPT, ZERO3

pytestmark = pytest.mark.slow

LAUNCHERS = {
    "teamlora": ["teamlora", "train"],
    "bash": ["bash", SCRIPT, "num_gpus=2"],
    "deepspeed": ["deepspeed", "--num_gpus", "2", SCRIPT],
    "no_python": ["deepspeed", "--no_python", "--num_gpus", "2", SCRIPT],
    "torchrun": ["torchrun", "--nproc_per_node", "2", SCRIPT],
}


@pytest.fixture(scope="module")
def first(workplace):
    """The run of one process without ZeRO, which the others are compared with."""
    done = workplace.teamlora("train", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.fixture(params=LAUNCHERS)
def launched(request, workplace, first):
    done = workplace.run(*LAUNCHERS[request.param], "recipe.yaml", f"run.name={request.param}", ZERO3)
    assert done.returncode == 0, done.stdout + done.stderr
    return request.param


def test_every_launcher_trains_the_same_run_whatever_its_ranks(workplace, launched):
    expected, found = workplace.records("first"), workplace.records(launched)
    assert [record["step"] for record in found] == [1, 2, 3, 4]
    for key in ("loss", "grad_norm", "learning_rate", "labelled_tokens", "tokens"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
    assert found[-1]["held_out_loss_by_task"] == pytest.approx(expected[-1]["held_out_loss_by_task"], rel=1e-4)
    published = [load_file(workplace.folder / "runs" / run / "adapter" / "adapter_model.safetensors") for run in
                 ("first", launched)]  # fmt: skip
    assert {n: t.shape for n, t in published[0].items()} == {n: t.shape for n, t in published[1].items()}


def test_placed_experts_train_the_same_run_and_publish_the_same_adapter(workplace, first):
    command = ["bash", SCRIPT, "num_gpus=2", "recipe.yaml", "run.name=placed", ZERO3, "experts.parallel_size=2"]
    done = workplace.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    assert (
        "experts         1 of 2 on each of 2 ranks, 1 replicas, partitioned on each; tokens travel up to" in done.stdout
    )
    counts = [
        next(line for line in text.splitlines() if line.startswith("parameters")) for text in (first, done.stdout)
    ]
    assert counts[0] == counts[1]
    expected, found = workplace.records("first"), workplace.records("placed")
    for key in ("loss", "grad_norm"):
        assert [r[key] for r in found] == pytest.approx([r[key] for r in expected], rel=1e-4), key
    published = [load_file(workplace.folder / "runs" / run / "adapter" / "adapter_model.safetensors") for run in
                 ("first", "placed")]  # fmt: skip
    assert {n: t.shape for n, t in published[0].items()} == {n: t.shape for n, t in published[1].items()}
    listed = workplace.teamlora("experts", "runs/placed")
    assert listed.returncode == 0, listed.stderr
    assert [line.split()[0] for line in listed.stdout.splitlines()] == ["expert", "0", "1"]


def test_a_run_leaves_recipe_environment_metrics_and_adapter(workplace, first):
    run = workplace.folder / "runs" / "first"
    assert {path.name for path in run.iterdir()} >= {
        "recipe.yaml", "environment.json", "metrics.jsonl", "tensorboard", "adapter",
    }  # fmt: skip
    assert yaml.safe_load((run / "recipe.yaml").read_text())["train"]["micro_batch_size"] == 1
    (environment,) = json.loads((run / "environment.json").read_text())
    assert environment["step"] == 0
    assert environment["world_size"] == 1
    assert environment["versions"]["deepspeed"] == "0.19.8"
    prepared = yaml.safe_load((run / "recipe.yaml").read_text())["data"]["prepared_dir"]
    manifest = json.loads((workplace.folder / prepared / "manifest.json").read_text())
    assert environment["prepared_key"] == manifest["key"]
    assert not [path for path in run.iterdir() if path.name.startswith(".")]


def test_facts_are_told_before_the_first_step(workplace, first):
    facts = first[: first.index("step 1/4")]
    for fact in (
        "trainable",
        "frozen",
        "bytes per rank",
        "4 accumulation",
        "4 steps",
        "tensorboard --logdir",
        "start-up",
    ):
        assert fact in facts, fact


def test_metrics_hold_loss_by_task_speed_memory_and_routers(workplace, first):
    records = workplace.records("first")
    assert {task for record in records for task in record["loss_by_task"]} == {"upper", "twice"}
    assert [("held_out_loss" in record) for record in records] == [False, True, False, True]
    for record in records:
        assert record["grad_norm"] > 0
        assert sum(record["router_weight"]) == pytest.approx(1)
        assert 0 < record["router_entropy"] <= math.log(2)
        assert record["tokens_per_second"] == pytest.approx(record["tokens"] / record["step_seconds"])
        assert record["peak_memory_bytes"] > 1e8


def test_tensorboard_shows_what_metrics_hold(workplace, first):
    events = EventAccumulator(str(workplace.folder / "runs" / "first" / "tensorboard")).Reload()
    records = workplace.records("first")
    for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("router/entropy", "router_entropy")):
        shown = [(event.step, event.value) for event in events.Scalars(tag)]
        assert shown == [(r["step"], pytest.approx(r[key])) for r in records]
    tags = set(events.Tags()["scalars"])
    assert {"train/loss_by_task/upper", "held_out/loss_by_task/twice", "router/weight/expert_1"} <= tags


def test_generate_answers_and_evaluate_scores_by_task(workplace, first):
    answer = workplace.teamlora("generate", "runs/first", "--prompt", "upper word3", "--max-new-tokens", "5")
    assert answer.returncode == 0, answer.stderr
    done = workplace.teamlora("evaluate", "runs/first", "--items-per-task", "3")
    assert done.returncode == 0, done.stderr
    kept = json.loads((workplace.folder / "runs" / "first" / "evaluation.json").read_text())
    assert [(task["task"], task["items"]) for task in kept["tasks"]] == [("upper", 3), ("twice", 3)]


def test_a_finished_run_says_so_and_ends_well(workplace, first):
    before = workplace.records("first")
    again = workplace.teamlora("train", "recipe.yaml")
    assert again.returncode == 0
    assert "runs/first is finished" in again.stdout
    assert workplace.records("first") == before


def test_a_run_can_start_from_the_adapter_of_another(workplace, first):
    done = workplace.teamlora("train", "recipe.yaml", "run.name=second", "adapter.init_from=runs/first/adapter")
    assert done.returncode == 0, done.stderr
    assert workplace.records("second")[0]["loss"] < workplace.records("first")[0]["loss"]


def test_no_run_starts_from_half_an_adapter(workplace, first):
    partial = shutil.copytree(workplace.folder / "runs" / "first" / "adapter", workplace.folder / "partial")
    tensors = load_file(partial / "adapter_model.safetensors")
    tensors.popitem()
    save_file(tensors, partial / "adapter_model.safetensors")
    done = workplace.teamlora("train", "recipe.yaml", "run.name=half", "adapter.init_from=partial")
    assert done.returncode == 2
    assert done.stderr.count("error: partial: parts of the adapter are missing") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (workplace.folder / "runs" / "half" / "adapter").exists()


def test_a_loss_that_is_not_finite_ends_the_run_with_its_cause_and_leaves_no_adapter(workplace, first):
    done = workplace.teamlora(
        "train", "recipe.yaml", "run.name=diverged", "train.learning_rate=1e30", "train.max_grad_norm=0"
    )
    assert done.returncode == 1
    assert done.stderr.count("error: step ") == 1
    assert "is not finite" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "runs" / "diverged" / "adapter").exists()


def test_a_launch_that_a_mistake_ends_leaves_no_process_and_says_one_line(workplace, first):
    done = workplace.run("bash", SCRIPT, "num_gpus=2", "recipe.yaml", "run.name=bad", "adapter.target_modules=[nope]")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "Traceback" not in done.stdout + done.stderr
    assert not (workplace.folder / "runs" / "bad").exists()
    assert not [pid for pid in os.listdir("/proc") if pid.isdigit() and _runs_here(pid, "run.name=bad")]


def _runs_here(pid: str, word: str) -> bool:
    try:
        with open(f"/proc/{pid}/cmdline", "rb") as file:
            return word.encode() in file.read()
    except OSError:
        return False
