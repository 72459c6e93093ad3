"""The evaluate command on one rank and two, in shards or not, against other runs; what it leaves, and mistakes."""

import json
import shutil
from typing import Any

import pytest
import yaml
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.workplace import REPOSITORY, Workplace, make_workplace

pytestmark = pytest.mark.slow

ZERO3 = str(REPOSITORY / "ds_configs" / "zero3.json")
TORCHRUN = ("torchrun", "--nproc_per_node", "2", "-m", "trainer", "evaluate")
DEEPSPEED = ("deepspeed", "--num_gpus", "2", "--module", "trainer", "evaluate")
LEARNT = ("train.steps=40", "train.learning_rate=0.01", "train.eval_every=0")
METRICS = ("exact_match", "token_f1", "rouge_l", "choices", "choices_by_length", "chosen", "given")


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Workplace:
    """Three tasks, one of them with choices, and two runs of different methods that have learned a little."""
    place = make_workplace(tmp_path_factory.mktemp("evaluated"))
    colours = ["red", "green", "blue"]
    rows = [
        {"instruction": f"colour of {i}", "output": colours[i % 3], "choices": colours, "thing": i} for i in range(60)
    ]
    (place.folder / "colours.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = yaml.safe_load(place.recipe.read_text())
    recipe["data"]["sources"].append({"type": "files", "task": "colours", "path": "colours.jsonl", "metric": "choices"})
    place.recipe.write_text(yaml.safe_dump(recipe))
    lora = ("run.name=lora", "adapter.method=lora", "adapter.num_experts=1", "adapter.balance_loss_weight=0")
    for command in (("prepare",), ("train", *LEARNT), ("train", *LEARNT, *lora)):
        done = place.teamlora(command[0], "recipe.yaml", *command[1:])
        assert done.returncode == 0, done.stderr
    return place


def evaluated(place: Workplace, *command: str) -> dict[str, Any]:
    """evaluation.json after a command."""
    done = place.run(*command)
    assert done.returncode == 0, done.stdout + done.stderr
    return json.loads((place.folder / "runs" / "first" / "evaluation.json").read_text())


@pytest.fixture(scope="module")
def alone(place) -> dict[str, Any]:
    """By one process. Batches of 2 make 9 for generation and 15 for likelihoods: one of two ranks has one less."""
    return evaluated(place, "teamlora", "evaluate", "runs/first", "--batch-size", "2")


@pytest.mark.parametrize("launched", [[*TORCHRUN], [*DEEPSPEED], [*TORCHRUN, "--deepspeed", ZERO3]],
                         ids=["torchrun", "deepspeed", "zero3"])  # fmt: skip
def test_two_ranks_find_what_one_finds_to_the_last_digit(place, alone, launched):
    assert evaluated(place, *launched, "runs/first", "--batch-size", "2") == alone


@pytest.mark.parametrize("size", ["1", "16"])
def test_answers_and_scores_do_not_depend_on_the_batch(place, alone, size):
    found = evaluated(place, "teamlora", "evaluate", "runs/first", "--batch-size", size)
    for theirs, ours in zip(found["items"], alone["items"], strict=True):
        for name in ("base", "adapter"):
            a, b = theirs["models"][name], ours["models"][name]
            assert {key: a.get(key) for key in METRICS} == {key: b.get(key) for key in METRICS}
            assert a["loss"] == pytest.approx(b["loss"], rel=1e-5)


def test_the_loss_is_what_training_told_of_the_held_out_rows(place, alone):
    told = place.records("first")[-1]["held_out_loss_by_task"]
    assert {task["task"]: task["models"]["adapter"]["loss"] for task in alone["tasks"]} == pytest.approx(told, rel=1e-5)


def test_tensorboard_shows_scores_and_losses_at_the_last_step(place, alone):
    events = EventAccumulator(str(place.folder / "runs" / "first" / "tensorboard")).Reload()
    for task in alone["tasks"]:
        for key, tag in (("score", task["metric"]), ("loss", "loss")):
            last = events.Scalars(f"evaluate/{task['task']}/{tag}")[-1]
            assert (last.step, last.value) == (40, pytest.approx(task["models"]["adapter"][key], abs=1e-6))


def test_another_run_on_the_same_base_is_a_baseline_and_the_same_whoever_is_asked_first(place, alone):
    done = place.teamlora("evaluate", "runs/first", "--against", "base,runs/lora", "--batch-size", "2", "--json")
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert list(found["tasks"][0]["models"]) == ["base", "lora", "adapter"]
    assert found["baselines"] == {"base": None, "lora": "runs/lora/adapter"}
    assert {name: known["may_have_learned"] for name, known in found["trained_on"].items()} == {"lora": 0, "adapter": 0}
    for task, before in zip(found["tasks"], alone["tasks"], strict=True):
        assert task["models"]["adapter"] == before["models"]["adapter"]
        difference = task["differences"]["lora"]["loss"]
        expected = task["models"]["adapter"]["loss"] - task["models"]["lora"]["loss"]
        assert difference["mean"] == pytest.approx(expected, abs=1e-9)
        assert difference["low"] <= difference["mean"] <= difference["high"]
    folder = place.teamlora(
        "evaluate", "runs/lora/adapter", "--recipe", "recipe.yaml", "--against", "none", "--batch-size", "2", "--json"
    )
    assert folder.returncode == 0, folder.stderr
    lora = [task["models"]["adapter"] for task in json.loads(folder.stdout)["tasks"]]
    assert lora == [task["models"]["lora"] for task in found["tasks"]]


def test_a_model_that_was_trained_on_another_set_is_named(place):
    runs = place.folder / "runs"
    shutil.copytree(runs / "lora", runs / "foreign")
    (start,) = json.loads((runs / "foreign" / "environment.json").read_text())
    (runs / "foreign" / "environment.json").write_text(json.dumps([{**start, "prepared_key": "0" * 64}]))
    done = place.teamlora("evaluate", "runs/foreign", "--against", "runs/first", "--items-per-task", "2")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert line.startswith("warning: adapter was trained on another prepared set (")
    assert "which does not hold out 6 of the 6 asked items: it may have learned them; compare runs on one set" in line
    known = json.loads((runs / "foreign" / "evaluation.json").read_text())["trained_on"]
    assert {name: each["may_have_learned"] for name, each in known.items()} == {"first": 0, "adapter": 6}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["runs/first/adapter"], "give --recipe RECIPE"),
        (["runs/none"], "runs/none: no run here"),
        (["runs/first", "--against", "base,runs/none"], "runs/none: no run here"),
        (["runs/first", "--deepspeed", str(REPOSITORY / "ds_configs" / "zero2.json")], "only ZeRO stage 3"),
    ],
)
def test_a_mistake_is_one_line(place, arguments, said):
    done = place.teamlora("evaluate", *arguments)
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert said in line
    assert "Traceback" not in done.stderr
