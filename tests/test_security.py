"""What the code never does, seen in its syntax trees: run pickles, code of others unasked, or text in a shell."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
PICKLES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib"}
ARCHIVES = {"tarfile", "zipfile"}
CALLS = {
    *("eval", "exec", "compile", "__import__", "os.system", "os.popen", "subprocess.getoutput"),
    *("subprocess.getstatusoutput", "asyncio.create_subprocess_shell", "torch.load", "shutil.unpack_archive"),
    *("yaml.load", "yaml.load_all", "yaml.unsafe_load", "yaml.full_load", "pty.spawn"),
}
METHODS = {"extractall", "read_pickle", "to_pickle"}
SPAWN = {f"subprocess.{name}" for name in ("run", "Popen", "call", "check_call", "check_output")}
# The one archive that is opened is a wheel whose sha256 is checked before, and one member of it is taken.
ALLOWED = {("trainer/base/sample.py", "import zipfile")}


def dangers(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in PICKLES | ARCHIVES)
        elif isinstance(node, ast.Call):
            yield from _dangers_of_call(node, ast.unparse(node.func))


def _dangers_of_call(call: ast.Call, name: str) -> Iterator[str]:
    if name in CALLS or name.rpartition(".")[2] in METHODS:
        yield name
    if name in SPAWN and isinstance(call.args[0], ast.Constant | ast.JoinedStr | ast.BinOp):
        yield f"{name} of a text"
    for keyword in call.keywords:
        constant = isinstance(keyword.value, ast.Constant) and keyword.value.value
        if keyword.arg == "shell" or (keyword.arg == "allow_pickle" and constant):
            yield f"{keyword.arg}="
        if keyword.arg == "trust_remote_code" and not ast.unparse(keyword.value).endswith("trust_remote_code"):
            yield "trust_remote_code= other than the recipe's"


@pytest.mark.parametrize("folder", ["trainer", "data_prep", "benchmarks"])
def test_no_pickle_no_code_of_others_and_no_shell(folder):
    found = {
        (str(path.relative_to(REPOSITORY)), danger)
        for path in (REPOSITORY / folder).rglob("*.py")
        for danger in dangers(ast.parse(path.read_text(encoding="utf-8")))
    }
    assert found - ALLOWED == set()


@pytest.mark.parametrize(
    "code",
    [
        "import pickle",
        "from shelve import open",
        "import tarfile",
        "eval(text)",
        "os.system(text)",
        "torch.load(path)",
        "yaml.load(text)",
        "archive.extractall(folder)",
        "subprocess.run(words, shell=True)",
        "subprocess.Popen('rm x')",
        "subprocess.run(f'rm {x}')",
        "subprocess.run('rm ' + x)",
        "np.load(path, allow_pickle=True)",
        "AutoConfig.from_pretrained(folder, trust_remote_code=True)",
    ],
)
def test_the_walk_finds_what_it_looks_for(code):
    assert list(dangers(ast.parse(code))) != []


def test_remote_code_is_off_unless_the_recipe_asks():
    from trainer.recipe import BaseModelConfig

    assert BaseModelConfig(model="m").trust_remote_code is False


@pytest.mark.parametrize("name", ["../x", "a/b", "/tmp/x", "..", ".", ".hidden", "", "a\n", "-x\0"])
def test_no_run_can_be_named_so_that_it_lies_elsewhere(name):
    from pydantic import ValidationError

    from trainer.recipe import RunConfig

    with pytest.raises(ValidationError, match=r"name"):
        RunConfig(name=name)
