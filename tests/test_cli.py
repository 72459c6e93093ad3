"""The command line: every command explains itself with an example; versions and recipes are shown."""

import errno
import os
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from trainer import recipe_file
from trainer.cli import COMMANDS, main
from trainer.cluster.launch_options import LaunchOptions
from trainer.run.launch_protocol import FAULT
from trainer.run.resources import recipes

REPOSITORY = Path(__file__).parent.parent


def help_of(capsys: pytest.CaptureFixture, *command: str) -> str:
    with pytest.raises(SystemExit) as ended:
        main([*command, "--help"])
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", [command.name for command in COMMANDS])
def test_the_help_of_every_command_ends_with_an_example(capsys, command):
    text = help_of(capsys, command)
    assert "example" in text
    assert text.rstrip().splitlines()[-1].startswith(f"  teamlora {command}")


def test_the_help_lists_every_command_and_experts_last(capsys):
    text = help_of(capsys)
    places = [text.index(f"\n    {command.name} ") for command in COMMANDS]
    assert places == sorted(places)
    assert COMMANDS[-1].name == "experts"


def test_the_help_of_launch_names_each_of_its_options(capsys):
    text = help_of(capsys, "launch")
    for option in LaunchOptions.model_fields.keys() - {"arguments"}:
        assert f"\n  {option}=" in text, option


def test_the_version_is_that_of_the_package(capsys):
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out.startswith(f"teamlora {version('teamlora')}, commit ")


def test_recipes_are_listed_a_line_each_and_one_is_printed_as_it_is(capsys):
    assert main(["recipes"]) == 0
    lines = capsys.readouterr().out.splitlines()[1:]
    assert [line.split()[0] for line in lines] == list(recipes())
    assert main(["recipes", "quickstart"]) == 0
    assert capsys.readouterr().out == recipes()["quickstart"].read_text()


def test_an_unknown_recipe_is_one_line_of_error(capsys):
    assert main(["recipes", "quickstrat"]) == 2
    assert capsys.readouterr().err.startswith(
        "error: quickstrat: expected the name of a recipe; give one of quickstart"
    )


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC, errno.EMFILE])
def test_a_disk_that_fails_or_a_limit_is_one_line_and_a_fault(capsys, monkeypatch, number):
    def fail(*_):
        raise OSError(number, os.strerror(number), "base/config.json")

    monkeypatch.setattr(recipe_file, "load_recipe", fail)
    assert main(["prepare", "recipe.yaml"]) == FAULT
    line = f"error: base/config.json: {os.strerror(number)}; mend that and start again: nothing saved is lost\n"
    assert capsys.readouterr().err == line


def test_started_by_its_path_the_package_wins_over_a_folder_of_that_name(tmp_path):
    (tmp_path / "trainer").mkdir()
    (tmp_path / "trainer" / "__init__.py").write_text("raise SystemExit('the wrong trainer')")
    program = str(REPOSITORY / "trainer" / "__main__.py")
    done = subprocess.run([sys.executable, program, "--version"], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
