"""YAML's traps: a value is what its author meant, or is refused with what to write instead."""

import re
from pathlib import Path
from typing import Any

import pytest

from data_prep.user_error import UserError
from tests.support.minimal_recipe import MINIMAL
from trainer.recipe_file import dump_recipe, load_recipe


@pytest.fixture
def path(tmp_path) -> Path:
    path = tmp_path / "recipe.yaml"
    path.write_text(MINIMAL)
    return path


def value(path: Path, key: str, overrides: list[str]) -> Any:
    found = load_recipe(path, overrides).model_dump()
    for part in key.split("."):
        found = found[int(part)] if isinstance(found, list) else found[part]
    return found


@pytest.mark.parametrize(
    ("key", "text", "expected"),
    [
        ("data.held_out", "5e-2", 0.05),
        ("data.cleaning.near_duplicates", "8E-1", 0.8),
        ("train.weight_decay", ".1e0", 0.1),
        ("train.weight_decay", "1.e-1", 0.1),
        ("train.steps", "1e3", 1000),
        ("train.steps", "1_000", 1000),
        ("train.steps", "'12'", 12),
        ("data.mixing.weights", "{sums: 2e0}", {"sums": 2.0}),
        ("report.tensorboard", "no", False),
        ("run.name", "'no'", "no"),
        ("run.name", "'1e5'", "1e5"),
        ("run.name", "1e5x", "1e5x"),
        ("base.revision", "'2026-01-01'", "2026-01-01"),
    ],
)
def test_a_value_is_read_as_it_is_meant_and_written_so_that_it_is_read_again(path, key, text, expected):
    found = value(path, key, [f"{key}={text}"])
    assert (found, type(found)) == (expected, type(expected))
    path.write_text(dump_recipe(load_recipe(path, [f"{key}={text}"])))
    assert value(path, key, []) == expected


@pytest.mark.parametrize(
    ("key", "text", "kind"),
    [
        ("run.name", "no", "the boolean false"),
        ("run.name", "on", "the boolean true"),
        ("data.sources.0.task", "Off", "the boolean false"),
        ("data.system_prompt", "yes", "the boolean true"),
        ("run.name", "2026-01-01", "the date 2026-01-01"),
        ("run.name", "1_000", "the number 1000"),
        ("base.revision", "1234567", "the number 1234567"),
        ("base.revision", "12e4", "the number 120000.0"),
        ("run.output_dir", "2026", "the number 2026"),
        ("run.output_dir", "~", "null"),
    ],
)
def test_text_that_yaml_takes_for_something_else_is_to_be_put_in_quotes(path, key, text, kind):
    place = key.replace(".0.", "[0].")
    message = f"{path}: {place}: expected text, but this is read as {kind}; put text in quotes"
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        load_recipe(path, [f"{key}={text}"])


def test_a_key_that_yaml_takes_for_a_boolean_is_to_be_put_in_quotes(path):
    message = r"a key of data\.mixing\.weights: expected text, but this is read as the boolean false; put text in quo"
    with pytest.raises(UserError, match=message):
        load_recipe(path, ["data.mixing.weights={no: 2}"])
    path.write_text("yes: 1\n" + MINIMAL)
    with pytest.raises(UserError, match=r"unknown key True; known keys: run, base"):
        load_recipe(path)


@pytest.mark.parametrize("key", ["train.steps", "train.learning_rate", "run.start_timeout", "train.weight_decay"])
def test_a_boolean_is_no_number(path, key):
    with pytest.raises(UserError, match=rf": {re.escape(key)}: expected a number, but YAML reads yes, on and true as"):
        load_recipe(path, [f"{key}=yes"])


def test_a_boolean_is_no_number_inside_a_mapping(path):
    with pytest.raises(UserError, match=r": data\.mixing\.weights\.sums: expected a number, but YAML reads yes"):
        load_recipe(path, ["data.mixing.weights={sums: on}"])


@pytest.mark.parametrize(
    ("key", "text", "read"),
    [
        ("run.seed", "010", "8"),
        ("run.name", "007", "7"),
        ("train.steps", "1:30", "90"),
        ("run.start_timeout", "1:30.5", "90.5"),
        ("data.system_prompt", "12:30", "750"),
    ],
)
def test_a_number_in_base_8_or_60_is_refused(path, key, text, read):
    problem = f"{key}: YAML reads {text} as {read}; write the number that you mean, or put text in quotes"
    with pytest.raises(UserError, match=f"^argument '{key}={text}': {re.escape(problem)}$"):
        load_recipe(path, [f"{key}={text}"])
    section, name = key.split(".")
    path.write_text(f"# a comment\n{section}:\n  {name}: {text}\n")
    with pytest.raises(UserError, match=f"^recipe {path}, line 3: {re.escape(problem)}$"):
        load_recipe(path)


@pytest.mark.parametrize("text", ["run:\n\tname: a\n", "run: {name: a}\n---\nrun: {name: b}\n", "run: {name: @a}\n"])
def test_what_yaml_does_not_take_is_refused_in_one_line(path, text):
    path.write_text(text)
    with pytest.raises(UserError, match=r"not YAML: .*line \d") as refusal:
        load_recipe(path)
    assert "\n" not in str(refusal.value)


def test_a_byte_order_mark_and_windows_line_ends_are_no_mistake(path):
    path.write_bytes(b"\xef\xbb\xbf" + MINIMAL.replace("\n", "\r\n").encode())
    assert load_recipe(path).run.name == "first"


PATHS = [
    "run.output_dir",
    "base.model",
    "adapter.init_from",
    "data.prepared_dir",
    "data.sources.0.path",
    "data.chat_template",
    "train.resume",
    "deepspeed.config",
]


@pytest.mark.parametrize("key", PATHS)
def test_the_home_folder_in_a_path_is_resolved_and_kept_so(path, key, monkeypatch):
    monkeypatch.setenv("HOME", "/home/somebody")
    recipe = load_recipe(path, [f"{key}=~/a/b"])
    path.write_text(dump_recipe(recipe))
    monkeypatch.setenv("HOME", "/home/else")
    assert str(value(path, key, [])) == "/home/somebody/a/b"


@pytest.mark.parametrize(
    ("key", "text"), [("base.model", "org/name"), ("train.resume", "auto"), ("deepspeed.config", "zero3")]
)
def test_names_are_not_paths(path, key, text):
    assert str(value(path, key, [f"{key}={text}"])) == text


def test_the_home_folder_on_the_command_line_is_resolved(monkeypatch):
    from trainer.cli import _parse
    from trainer.cluster.launch_options import parse_launch_options

    monkeypatch.setenv("HOME", "/h")
    export = _parse(["export", "~/run", "--to", "lora", "--output=~/out"])
    assert (str(export.directory), str(export.output)) == ("/h/run", "/h/out")
    check = _parse(["check", "~/r.yaml", "--hostfile=~/hosts"])
    assert (str(check.recipe), str(check.hostfile)) == ("/h/r.yaml", "/h/hosts")
    evaluate = _parse(["evaluate", "r", "--against=base,~/b", "--deepspeed=~/z.json"])
    assert (evaluate.against, str(evaluate.deepspeed)) == (["base", "/h/b"], "/h/z.json")
    launch = parse_launch_options(["hostfile=~/hosts", "~/r.yaml"])
    assert (str(launch.hostfile), str(launch.recipe)) == ("/h/hosts", "/h/r.yaml")
