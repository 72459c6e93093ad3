"""Where the code does something on a GPU that no CPU does: few places, each listed in docs/gpu.md."""

import ast
import re
from pathlib import Path

REPOSITORY = Path(__file__).parent.parent
MOST = 12


def asks_for_a_gpu(node: ast.AST) -> bool:
    """`torch.cuda.is_available()`, or a comparison of a device's type with "cuda"."""
    if isinstance(node, ast.Call):
        return ast.unparse(node.func) in ("torch.cuda.is_available", "torch.cuda.is_initialized")
    if isinstance(node, ast.Compare):
        sides = [ast.unparse(side) for side in (node.left, *node.comparators)]
        return "'cuda'" in sides and any(side.endswith(".type") for side in sides)
    return isinstance(node, ast.Attribute) and node.attr == "is_cuda"


def branches() -> list[str]:
    """A module of trainer/ for each place in it."""
    return [
        str(path.relative_to(REPOSITORY))
        for path in sorted((REPOSITORY / "trainer").rglob("*.py"))
        for node in ast.walk(ast.parse(path.read_text()))
        if asks_for_a_gpu(node)
    ]


def test_branches_that_only_gpus_take_are_few():
    found = branches()
    assert "trainer/run/gpu.py" in found, "the search finds them"
    assert len(found) <= MOST, found


def test_each_is_listed_in_the_documentation_with_a_test_that_is_there():
    page = (REPOSITORY / "docs" / "gpu.md").read_text()
    rows = dict(re.findall(r"^\| `(trainer/[^`]*\.py)` \| [^|]* \| `(tests/[^`]*\.py)`", page, re.MULTILINE))
    assert rows.keys() == set(branches())
    assert [test for test in rows.values() if not (REPOSITORY / test).is_file()] == []
