"""Which code and which libraries made a run: package version, commit, and versions of the main dependencies."""

import json
import os
import subprocess
from importlib.metadata import Distribution, PackageNotFoundError, distribution, version
from pathlib import Path

from trainer.run.resources import PACKAGE_ROOT

PROJECT = "teamlora"
PACKAGES = ("torch", "deepspeed", "transformers", "peft", "bitsandbytes", "datasets")  # results depend on these


def versions() -> dict[str, str]:
    """Versions of the packages that results depend on."""
    return {name: version(name) for name in PACKAGES}


def package_version() -> str | None:
    """Version of this package as installed; None where it runs from a folder that was never installed."""
    try:
        return version(PROJECT)
    except PackageNotFoundError:
        return None


def commit(root: Path = PACKAGE_ROOT) -> str | None:
    """The commit this package was built from, never that of a repository it merely lies inside.

    root: folder that contains the package. In a clone of this project that is HEAD. For an install from a Git URL it
    is what pip recorded in direct_url.json (PEP 610). None where neither is known.
    """
    return _head_of_clone(root) or _commit_recorded_by_pip(root)


def _head_of_clone(root: Path) -> str | None:
    """HEAD, if `root` is the top level of a work tree with this project's setup.cfg."""
    setup = root / "setup.cfg"
    if not setup.is_file() or f"name = {PROJECT}" not in setup.read_text(encoding="utf-8").splitlines():
        return None
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}  # set in hooks
    command = ["git", "-C", str(root), "rev-parse", "--show-toplevel", "HEAD"]
    try:
        done = subprocess.run(
            command, env=environment, capture_output=True, encoding="utf-8", errors="replace", check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    top, head = done.stdout.splitlines()
    return head if Path(top).samefile(root) else None


def _commit_recorded_by_pip(root: Path) -> str | None:
    try:
        installed = distribution(PROJECT)
    except PackageNotFoundError:
        return None
    if not _contains(installed, root):
        return None
    recorded = json.loads(installed.read_text("direct_url.json") or "{}")
    return recorded.get("vcs_info", {}).get("commit_id")


def _contains(installed: Distribution, root: Path) -> bool:
    """Whether the installed distribution is the code in `root`, and not another copy elsewhere."""
    package = Path(str(installed.locate_file("trainer")))
    return package.is_dir() and (root / "trainer").is_dir() and package.samefile(root / "trainer")
