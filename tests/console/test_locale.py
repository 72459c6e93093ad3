"""In a locale that is not UTF-8, texts, names of files and output are what they are elsewhere."""

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.support.minimal_recipe import MINIMAL

REPOSITORY = Path(__file__).parent.parent.parent
ASCII = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}  # else Python takes UTF-8 in the C locale


def python(folder: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    environment = {**os.environ, **ASCII, "PYTHONPATH": str(REPOSITORY), "HF_HUB_OFFLINE": "1"}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True)


def test_a_command_finds_files_whose_names_are_not_ascii(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL, encoding="utf-8")
    (tmp_path / "größe.json").write_text('{"zero_optimization": {"stagé": 3}}', encoding="utf-8")
    done = python(tmp_path, "-m", "trainer", "launch", "hostfile=größe.json", "recipe.yaml")
    assert 'hostfile=größe.json, line 1: \'{"zero_optimization": {"stagé": 3}}\'' in done.stderr.decode("utf-8")
    assert done.returncode == 2


def test_a_recipe_is_read_and_what_the_terminal_lacks_is_printed_as_escapes(tmp_path):
    (tmp_path / "recipe.yaml").write_text(MINIMAL.replace("first", "größe"), encoding="utf-8")
    code = """
from pathlib import Path
from trainer.console.streams import survive_closed_streams
from trainer.recipe_file import load_recipe
name = load_recipe(Path("recipe.yaml")).run.name
with survive_closed_streams():
    print(name, len(name))
"""
    done = python(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == (b"gr\\xf6\\xdfe 5\n", b"")


def test_a_program_that_embeds_python_goes_on_and_its_children_are_in_utf8_mode(tmp_path):
    code = """
import os, sys
from trainer.console.utf8_mode import restart_in_utf8_mode
sys.executable = ""
restart_in_utf8_mode()
print(os.environ["PYTHONUTF8"], sys.flags.utf8_mode)
"""
    done = python(tmp_path, "-c", code)
    assert (done.stdout, done.stderr) == (b"1 0\n", b"")


def texts_by_locale(path: Path) -> Iterator[str]:
    """Places that read or write text in the locale's encoding."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Call):
            continue
        function, *values = map(ast.unparse, (node.func, *node.args, *(keyword.value for keyword in node.keywords)))
        named = {keyword.arg for keyword in node.keywords}
        read = function.endswith(".read_text") and not values  # of a path, not of a package's metadata
        text = read or function.endswith(".write_text") or (function.startswith("subprocess.") and "text" in named)
        binary = any(value.startswith("'") and "b" in value for value in values)
        opened = function.rpartition(".")[2] == "open" and function != "os.open" and not binary
        if (text or opened) and "encoding" not in named:
            yield f"{path.relative_to(REPOSITORY)}:{node.lineno}: {ast.unparse(node)}"


def test_texts_are_read_and_written_as_utf_8():
    found = [
        place
        for folder in ("trainer", "data_prep")
        for path in sorted((REPOSITORY / folder).rglob("*.py"))
        for place in texts_by_locale(path)
    ]
    assert found == []
