"""How the repository is laid out: who imports whom, how long files are, and that a file's name finds it."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
# Packages and modules of trainer/, from the top; imports go downwards, or sideways without circles.
LEVELS = [
    {"__main__"},
    {"cli"},
    {"training", "evaluation", "analysis", "export", "estimate", "cluster"},
    {"distributed", "checkpoint", "telemetry"},
    {"objective"},
    {"adapters"},
    {"base"},
    {"run", "console"},
    {"recipe", "recipe_file", "errors"},
    {"data_prep"},
]
LEVEL_OF = {name: level for level, names in enumerate(LEVELS) for name in names}
# What breaks these rules today; to be emptied, never to be added to.
UPWARD: set[tuple[str, str]] = set()
LONG = {"data_prep/chat.py"}
MOST_LINES = 350


def files(*folders: str) -> list[Path]:
    return [path for folder in folders for path in sorted((REPOSITORY / folder).rglob("*.py"))]


def imported(path: Path) -> Iterator[str]:
    """Dotted names that a file imports, `from a import b` as a.b, wherever in it they stand."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def package_of(dotted: str) -> str | None:
    """trainer.base.nf4 -> base, data_prep.chat -> data_prep, os.path -> None"""
    first, _, rest = dotted.partition(".")
    return {"trainer": rest.partition(".")[0], "data_prep": first}.get(first)


def package_imports() -> dict[tuple[str, str], list[str]]:
    """{(importing package, imported package): the places where}"""
    found: dict[tuple[str, str], list[str]] = {}
    for path in files("trainer", "data_prep"):
        relative = path.relative_to(REPOSITORY)
        own = package_of(".".join(relative.with_suffix("").parts))
        for dotted in imported(path):
            other = package_of(dotted)
            if other is not None and other != own:
                found.setdefault((own, other), []).append(f"{relative}: {dotted}")
    return found


def test_imports_between_packages_go_downwards():
    found = package_imports()
    unknown = {name for pair in found for name in pair} - LEVEL_OF.keys()
    assert not unknown, "give each new package its place in LEVELS"
    upward = {pair: places for pair, places in found.items() if LEVEL_OF[pair[0]] > LEVEL_OF[pair[1]]}
    assert {pair: places for pair, places in upward.items() if pair not in UPWARD} == {}


def test_imports_between_packages_make_no_circle():
    graph: dict[str, set[str]] = {}
    for own, other in package_imports().keys() - UPWARD:
        graph.setdefault(own, set()).add(other)
    TopologicalSorter(graph).prepare()  # raises CycleError, which names the circle


@pytest.mark.parametrize(
    ("folder", "barred", "but"),
    [
        ("tests", "benchmarks", None),
        ("benchmarks", "tests", "tests.support"),
        ("tests/support", "tests", "tests.support"),
    ],
)
def test_tests_and_benchmarks_share_only_the_support(folder, barred, but):
    def is_barred(dotted: str) -> bool:
        return f"{dotted}.".startswith(f"{barred}.") and not (but and f"{dotted}.".startswith(f"{but}."))

    assert [f"{path}: {name}" for path in files(folder) for name in imported(path) if is_barred(name)] == []


def private_deepspeed(tree: ast.AST) -> Iterator[str]:
    """Attributes ds_*, private names of DeepSpeed's modules, and imports of modules that it does not document."""
    public = {"deepspeed", "deepspeed.launcher.launch"}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and re.match(r"ds_|_z3_|_hp_mapping|_convert_to_deepspeed", node.attr):
            yield node.attr
        elif isinstance(node, ast.Attribute) and "deepspeed" in ast.unparse(node.value) and node.attr.startswith("_"):
            yield ast.unparse(node)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").partition(".")[0] == "deepspeed":
            yield from (f"{node.module}.{alias.name}" for alias in node.names if node.module not in public)
        elif isinstance(node, ast.Import):
            yield from (a.name for a in node.names if a.name.startswith("deepspeed.") and a.name not in public)
        elif isinstance(node, ast.Call) and ast.unparse(node.func) in ("getattr", "hasattr", "setattr"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and str(a.value).startswith("ds_"))


def test_one_module_touches_deepspeeds_private_parts():
    found = {
        str(path.relative_to(REPOSITORY)): names
        for path in files("trainer", "data_prep", "launch")
        if (names := sorted(set(private_deepspeed(ast.parse(path.read_text())))))
    }
    internals = found.pop("trainer/distributed/deepspeed_internals.py")
    assert found == {}
    assert {"ds_tensor", "ds_shape", "ds_zero_partition_process_group"} <= set(internals), "the search finds them"


def test_no_file_is_long():
    lengths = {
        str(path.relative_to(REPOSITORY)): len(path.read_text().splitlines())
        for path in files("trainer", "data_prep", "launch")
    }
    assert {name: count for name, count in lengths.items() if count > MOST_LINES and name not in LONG} == {}


def test_a_file_name_is_given_once():
    names = Counter(path.name for path in files("trainer", "data_prep"))
    assert {name for name, count in names.items() if count > 1} <= {"__init__.py", "__main__.py"}


def test_few_files_lie_beside_the_packages_of_trainer():
    assert len(list((REPOSITORY / "trainer").glob("*.py"))) <= 6
