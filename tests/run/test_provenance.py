"""The commit of a run is that of this package's own code."""

import json
import os
import subprocess
from pathlib import Path

import pytest

from trainer.run.provenance import commit


def git(folder: Path, *arguments: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("GIT_")}
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip()


def repository(folder: Path, project: str | None = None) -> str:
    """Makes a repository with one commit, and with that project's setup.cfg; returns the commit."""
    (folder / "trainer").mkdir(parents=True)
    if project is not None:
        (folder / "setup.cfg").write_text(f"[metadata]\nname = {project}\n")
    git(folder, "init", "--quiet")
    git(folder, "add", ".")
    git(folder, "commit", "--quiet", "--allow-empty", "-m", "first")
    return git(folder, "rev-parse", "HEAD")


def test_in_a_clone_it_is_head(tmp_path):
    head = repository(tmp_path / "clone", "teamlora")
    assert commit(tmp_path / "clone") == head


@pytest.mark.parametrize("project", [None, "another"])
def test_the_repository_of_another_project_does_not_count(tmp_path, project):
    repository(tmp_path, project)
    assert commit(tmp_path) is None


def test_a_repository_around_a_copy_of_this_project_does_not_count(tmp_path):
    repository(tmp_path, "teamlora")
    copy = tmp_path / "vendored"
    copy.mkdir()
    (copy / "setup.cfg").write_text("[metadata]\nname = teamlora\n")
    assert commit(copy) is None


def test_the_repository_a_git_hook_runs_in_does_not_count(tmp_path, monkeypatch):
    head = repository(tmp_path / "clone", "teamlora")
    assert repository(tmp_path / "hooked", "hooked") != head
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "hooked" / ".git"))
    assert commit(tmp_path / "clone") == head


@pytest.fixture
def installed(tmp_path, monkeypatch) -> Path:
    """A folder of installed packages with this one, from a Git URL, inside the repository of another project."""
    repository(tmp_path, "another")
    folder = tmp_path / "site-packages"
    (folder / "trainer").mkdir(parents=True)
    metadata = folder / "teamlora-9.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: teamlora\nVersion: 9\n")
    url = {"url": "https://example.com/teamlora.git", "vcs_info": {"vcs": "git", "commit_id": "ab12"}}
    (metadata / "direct_url.json").write_text(json.dumps(url))
    monkeypatch.syspath_prepend(folder)
    return folder


def test_installed_from_a_git_url_it_is_what_pip_recorded(installed):
    assert commit(installed) == "ab12"


def test_what_pip_recorded_of_another_copy_does_not_count(installed, tmp_path):
    (tmp_path / "copy" / "trainer").mkdir(parents=True)
    assert commit(tmp_path / "copy") is None


def test_installed_from_an_index_it_is_unknown(installed):
    (installed / "teamlora-9.dist-info" / "direct_url.json").unlink()
    assert commit(installed) is None
