"""`teamlora router` on finished runs: a folder of pictures, numbers and tokens; mistakes in one line."""

import json

import pytest

from tests.e2e.test_mistakes import mistake

pytestmark = pytest.mark.slow

PICTURES = {"layers.png", "tasks.png", "distances.png", "use.png", "alone.png"}


@pytest.fixture(scope="module")
def runs(workplace):
    """Runs by method, of two steps each."""
    for method in ("teamlora", "hydralora", "lora"):
        options = ["adapter.num_experts=1", "adapter.balance_loss_weight=0"] if method == "lora" else []
        names = [f"run.name=router-{method}", f"adapter.method={method}", "train.steps=2"]
        done = workplace.teamlora("train", "recipe.yaml", *names, *options)
        assert done.returncode == 0, done.stderr
    return workplace.folder / "runs"


def shown(workplace, run, *options):
    done = workplace.teamlora("router", f"runs/{run}", "--items-per-task", "3", "--examples", "2", *options)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_pictures_numbers_and_tokens_of_a_run(workplace, runs):
    said = shown(workplace, "router-teamlora")
    folder = runs / "router-teamlora" / "router"
    assert {path.name for path in folder.iterdir()} == {*PICTURES, "interaction.png", "router.json", "tokens.html"}
    assert all((folder / name).read_bytes().startswith(b"\x89PNG") for name in PICTURES)
    found = json.loads((folder / "router.json").read_text())
    assert found["documents"] == {"upper": 3, "twice": 3}
    assert len(found["linears"]) == len(found["omega_by_linear"]) == len(found["interaction"]) == 6
    assert sum(found["phi"]) == pytest.approx(1)
    assert sum(found["leading_share_by_task"]["upper"]) == pytest.approx(1)
    ways = found["alone"]["ways"]
    assert ways.keys() == {"base", "learned", "expert 0", "expert 1"}
    best = min(("expert 0", "expert 1"), key=lambda way: ways[way]["loss"])
    assert found["alone"]["best"] == best
    assert ways["learned"]["loss"] < ways["base"]["loss"]
    assert [line.split()[0] for line in said.splitlines() if line.startswith(("upper", "twice", "all"))] == [
        "upper", "twice", "all",
    ] * 2  # fmt: skip
    assert (folder / "tokens.html").read_text().count("<h2>") == 2


def test_a_second_look_takes_the_place_of_the_first_and_leaves_nothing_behind(workplace, runs):
    for _ in range(2):
        shown(workplace, "router-teamlora", "--to", "looks/here")
    assert [path.name for path in (workplace.folder / "looks").iterdir()] == ["here"]


def test_a_method_without_interaction_matrix_says_so(workplace, runs):
    assert "hydralora has no interaction matrix: omega is phi" in shown(workplace, "router-hydralora")
    folder = runs / "router-hydralora" / "router"
    assert {path.name for path in folder.iterdir()} == {*PICTURES, "router.json", "tokens.html"}
    found = json.loads((folder / "router.json").read_text())
    assert found["interaction"] is None
    assert found["does_not_apply"] == {"interaction": "hydralora has no interaction matrix: omega is phi"}
    assert found["omega"] == found["phi"]


def test_mistakes(workplace, runs, monkeypatch, capsys):
    monkeypatch.chdir(workplace.folder)
    assert "adapter.method=lora has no router" in mistake(["router", "runs/router-lora"], capsys)
    assert "no run here (no recipe.yaml)" in mistake(["router", "base"], capsys)
    taken = mistake(["router", "runs/router-teamlora", "--to", "base"], capsys)
    assert "--to: base exists and was not written by this command" in taken


def test_tensorboard_has_the_last_steps_pictures(runs):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    tags = {
        method: EventAccumulator(str(runs / f"router-{method}" / "tensorboard")).Reload().Tags()["images"]
        for method in ("teamlora", "hydralora", "lora")
    }
    common = {"router/layers_x_experts", "router/tasks_x_experts"}
    assert set(tags["teamlora"]) == {*common, "router/interaction"}
    assert set(tags["hydralora"]) == common
    assert tags["lora"] == []
