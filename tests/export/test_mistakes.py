"""A mistake is one line and status 2, before the model is loaded where that can be; nothing is left behind."""

import re

import pytest

from data_prep.user_error import UserError
from trainer.cli import main
from trainer.export import export as exporting
from trainer.export.export import ExportRequest, export


@pytest.fixture
def no_loading(monkeypatch):
    def refuse(_):
        raise AssertionError("the model was loaded")

    monkeypatch.setattr(exporting, "load_run", refuse)


@pytest.mark.parametrize(
    ("method", "options", "said"),
    [
        ("teamlora", ["--to", "lora", "--task", "sums"], "--task sums: .* has no such task; it has upper, twice"),
        ("teamlora", ["--to", "lora", "--base", "original"], "--base original: --to lora writes no base; remove it"),
        (
            "teamlora",
            ["--to", "merged", "--base", "dequantised"],
            "quantization=none, so there is nothing to dequantize",
        ),
        (
            "teamlora",
            ["--to", "peft", "--task", "upper"],
            "--task upper: --to peft keeps the gates as they are",
        ),
        (
            "lora",
            ["--to", "lora", "--task", "upper"],
            "--task upper: .* was trained with adapter.method=lora, which has no gates",
        ),
    ],
)
def test_what_cannot_be_exported_is_refused(make_run, no_loading, capsys, method, options, said):
    run = make_run(method)
    before = sorted(run.folder.rglob("*"))
    assert main(["export", str(run.folder), *options]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: --")
    assert re.search(said, error)
    assert sorted(run.folder.rglob("*")) == before


def test_an_existing_folder_is_left_alone(make_run, no_loading):
    run = make_run()
    (run.folder / "export-lora").mkdir()
    with pytest.raises(UserError, match=r"--output: .*export-lora exists; give another folder or remove it"):
        export(ExportRequest(run.folder, "lora"))


def test_a_place_that_cannot_be_written_is_told(make_run, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"--output: cannot write .*; give a folder that can be written"):
        export(ExportRequest(make_run().folder, "peft", tmp_path / "file" / "export"))


def test_a_run_that_is_none_is_told(tmp_path):
    with pytest.raises(UserError, match="no run here"):
        export(ExportRequest(tmp_path, "lora"))


def test_what_stops_on_the_way_leaves_nothing_behind(make_run, monkeypatch):
    run = make_run()
    before = sorted(run.folder.rglob("*"))

    def stop(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(exporting, "measure", stop)
    with pytest.raises(KeyboardInterrupt):
        export(ExportRequest(run.folder, "merged"))
    assert sorted(run.folder.rglob("*")) == before


def test_modules_saved_whole_are_refused(make_run):
    run = make_run(modules_to_save=["lm_head"])
    with pytest.raises(UserError, match=r"modules_to_save, biases or magnitudes .*; export it with --to peft"):
        export(ExportRequest(run.folder, "lora"))
