"""Damaged run and checkpoint folders: resumed from what is whole, or refused in one line; never in silence."""

import json
from pathlib import Path
from typing import Any

from hypothesis import example, given
from hypothesis import strategies as st

from tests.fuzz.fuzzing import Outcomes, fuzz
from tests.fuzz.mutations import values
from tests.support.minimal_recipe import MINIMAL
from trainer.base.base_fingerprint import check_base_file
from trainer.checkpoint import storage
from trainer.checkpoint.manager import CheckpointManager, find_best
from trainer.recipe import CheckpointConfig
from trainer.recipe_file import dump_recipe, load_recipe
from trainer.run import run_dir
from trainer.telemetry.metrics import MetricsWriter
from trainer.training.resume import find_resume_point

STEPS = (1, 2)


def make_run(folder: Path) -> Any:
    """A run that stopped after its second checkpoint."""
    folder.mkdir(parents=True)
    (folder / "my.yaml").write_text(MINIMAL)
    recipe = load_recipe(folder / "my.yaml", [f"run.output_dir={folder}"])
    run = recipe.run.directory
    run.mkdir()
    (run / run_dir.RECIPE).write_text(dump_recipe(recipe))
    (run / run_dir.ENVIRONMENT).write_text(json.dumps([{"started": "earlier"}]))
    lines = [json.dumps({"step": step, "loss": 1.0}) + "\n" for step in STEPS]
    (run / "metrics.jsonl").write_text("".join(lines))
    for step in STEPS:
        writer = storage.CheckpointWriter(run / "checkpoints", step)
        facts = {
            "step": step,
            "metrics_bytes": len("".join(lines[:step])),
            "held_out": {"best_step": 1, "best_loss": 2.0},
        }
        writer.add("run.json", json.dumps(facts).encode())
        writer.add("state-00001.safetensors", bytes(range(64)))
        writer.publish()
    storage.point(run / "checkpoints", storage.BEST, storage.folder_name(1))
    return recipe


FILES = [
    "recipe.yaml", "environment.json", "metrics.jsonl", "checkpoints", "checkpoints/best", "checkpoints/latest",
    "checkpoints/step-000001", "checkpoints/step-000002", "checkpoints/step-000002/index.json",
    "checkpoints/step-000002/run.json", "checkpoints/step-000002/state-00001.safetensors",
    "checkpoints/step-000001/index.json",
]  # fmt: skip
STRAY = [
    "adapter/", "adapter/README.md", "checkpoints/step-1", "checkpoints/step-000009", "checkpoints/step-000009/",
    "checkpoints/step-000002/state-00001.bak.safetensors", "checkpoints/.step-000003.partial/x", "notes.txt",
    "checkpoints/step-000002 copy/index.json", "tensorboard", ".nfs0001", "checkpoints/step-999999/index.json",
]  # fmt: skip
JSON_OF_ANY_SHAPE = values().map(json.dumps).map(str.encode) | st.binary(max_size=12) | st.just(b"[" * 3000)


def loses(path: Path) -> None:
    """Removes a file, or all below a folder."""
    if path.is_dir() and not path.is_symlink():
        storage.remove_folder(path)
    else:
        path.unlink(missing_ok=True)


@st.composite
def damages(draw: st.DrawFn) -> tuple[str, str, bytes]:
    how = draw(st.sampled_from(["content", "content", "cut", "remove", "folder", "loop", "windows", "stray"]))
    name = draw(st.sampled_from(STRAY if how == "stray" else FILES))
    return how, name, draw(JSON_OF_ANY_SHAPE)


def damage(run: Path, how: str, name: str, content: bytes) -> None:
    path = run / name
    if not path.parent.is_dir() and how != "stray":
        return
    match how:
        case "content" if path.is_file():
            path.write_bytes(content)
        case "cut" if path.is_file():
            path.write_bytes(path.read_bytes()[: len(content)])
        case "windows" if path.is_file():
            path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
        case "remove":
            loses(path)
        case "folder":
            loses(path)
            path.mkdir()
        case "loop":
            loses(path)
            path.symlink_to(path)
        case "stray" if not path.exists() and (run / "checkpoints").is_dir():
            path.parent.mkdir(parents=True, exist_ok=True)
            path.mkdir() if name.endswith("/") else path.write_bytes(content)


@fuzz(0.03)
@given(found=st.lists(damages(), min_size=1, max_size=3))
@example(found=[("content", "environment.json", b"3")])
@example(found=[("content", "environment.json", b"[" * 3000)])
@example(found=[("content", "checkpoints/step-000002/index.json", b'{"files": [], "sha256": 3}')])
@example(found=[("content", "checkpoints/best", b"\xff\xfe")])
@example(found=[("loop", "checkpoints/best", b"")])
@example(found=[("stray", "adapter/", b"")])
def test_runs_resume_from_the_newest_whole_checkpoint(found, outcomes: Outcomes, tmp_path_factory):
    recipe = make_run(tmp_path_factory.mktemp("runs") / "out")
    run = recipe.run.directory
    for each in found:
        damage(run, *each)
    point = outcomes.of(lambda: find_resume_point(recipe))
    if point is None:
        return
    assert not point.finished, "no adapter was published"
    whole = [step for step in STEPS if storage.verify(run / "checkpoints" / storage.folder_name(step)) is None]
    assert point.step == max(whole, default=0)
    outcomes.of(lambda: find_best(run / "checkpoints"))
    outcomes.of(lambda: run_dir.create(recipe, {}))
    outcomes.of(lambda: run_dir.open_run(run))


@fuzz(0.014)
@given(content=JSON_OF_ANY_SHAPE | st.just(b"step-000009\n") | st.just(b"step-\xb2\n"))
@example(content=b"\xff")
def test_a_damaged_best_does_not_stop_pruning(content, outcomes: Outcomes, tmp_path_factory):
    recipe = make_run(tmp_path_factory.mktemp("best") / "out")
    folder = recipe.run.directory / "checkpoints"
    (folder / storage.BEST).write_bytes(content)
    manager = CheckpointManager(None, folder, CheckpointConfig(keep_last=1))  # type: ignore[arg-type]
    writer = storage.CheckpointWriter(folder, 3)
    writer.add("run.json", b"{}")
    outcomes.of(lambda: manager._finish(3, None, writer))
    assert storage.steps_in(folder)[-1] == 3 and len(storage.steps_in(folder)) <= 2


def cut(text: bytes, at: int) -> bytes:
    return text[: at % (len(text) + 1)]


METRICS = "".join(json.dumps({"step": step, "loss": 1 / step}) + "\n" for step in range(1, 6)).encode()


@fuzz(0.014)
@given(content=st.integers(0, 500).map(lambda at: cut(METRICS, at)) | st.binary(max_size=300) | st.just(
    METRICS.replace(b"\n", b"\r\n")) | st.just(METRICS.replace(b"}\n{", b"}{")) | st.just(METRICS))  # fmt: skip
def test_metrics_that_are_not_those_of_the_steps_are_reported(content, outcomes: Outcomes, tmp_path_factory, capfd):
    folder = tmp_path_factory.mktemp("metrics")
    (folder / "metrics.jsonl").write_bytes(content)
    outcomes.of(lambda: MetricsWriter(folder, False, step=5, own=True).close())
    kept, warning = (folder / "metrics.jsonl").read_bytes(), capfd.readouterr().err
    assert content.startswith(kept) and (not kept or kept.endswith(b"\n"))
    assert (warning == "") == (kept.count(b"\n") == 5)
    assert warning.count("\n") <= 1


@fuzz(0.014)
@given(content=JSON_OF_ANY_SHAPE)
@example(content=b"3")
@example(content=b"null")
@example(content=b"[" * 3000)
def test_base_json_of_any_shape(content, outcomes: Outcomes, tmp_path_factory):
    folder = tmp_path_factory.mktemp("base")
    (folder / "base.json").write_bytes(content)
    outcomes.of(lambda: check_base_file(folder, "base", "0" * 64) or "accepted")
    assert outcomes.counts["accepted"] == 0
