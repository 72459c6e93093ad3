"""Commands of users that have no home, or none that they may enter."""

import os
import pwd
import subprocess
import sys
from pathlib import Path

import pytest

from trainer.run.user_home import ensure_home

REPOSITORY = Path(__file__).parents[2]


@pytest.fixture
def temporary(tmp_path, monkeypatch) -> Path:
    """The folder for temporary files, of a user whom the list of users lacks."""

    def unknown(number):
        raise KeyError(f"getpwuid(): uid not found: {number}")

    monkeypatch.setattr(pwd, "getpwuid", unknown)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / f"teamlora-home-{os.getuid()}"


@pytest.mark.parametrize("home", [None, "~"])
def test_a_user_without_a_home_gets_one_that_later_commands_share(temporary, monkeypatch, home):
    monkeypatch.setenv("HOME", home) if home is not None else monkeypatch.delenv("HOME")
    ensure_home()
    assert Path.home() == temporary and temporary.stat().st_mode & 0o777 == 0o700
    ensure_home()
    assert Path.home() == temporary


def test_a_home_that_can_be_written_stays(temporary, monkeypatch, tmp_path):
    for home in (tmp_path, tmp_path / "not yet there"):
        monkeypatch.setenv("HOME", str(home))
        ensure_home()
        assert os.environ["HOME"] == str(home) and not temporary.exists()


def test_a_home_that_can_only_be_read_stays_where_it_holds_caches(temporary, monkeypatch, tmp_path):
    home = tmp_path / "home"
    (home / ".cache").mkdir(parents=True)
    monkeypatch.setenv("HOME", str(home))
    monkeypatch.setattr(os, "access", lambda path, _: path != str(home))
    ensure_home()
    assert Path.home() == home
    (home / ".cache").rmdir()
    ensure_home()
    assert Path.home() == temporary


def test_a_command_runs_under_an_unknown_user_id(tmp_path):
    """As in `docker run --user 12345`; the capability lets it read this Python, wherever it is installed."""
    read = ["--inh-caps", "+dac_read_search", "--ambient-caps", "+dac_read_search"]
    user = ["setpriv", "--reuid", "12345", "--clear-groups", *read]
    if os.getuid() != 0 or subprocess.run([*user, "true"], capture_output=True).returncode:
        pytest.skip("needs root")
    script = "import os; from trainer.cli import main; main(['recipes']); print(os.environ['HOME'])"
    env = {"PATH": os.environ["PATH"], "PYTHONPATH": str(REPOSITORY), "TMPDIR": str(tmp_path)}
    tmp_path.chmod(0o777)
    for parent in tmp_path.parents[:2]:
        parent.chmod(0o755)
    done = subprocess.run([*user, sys.executable, "-c", script], cwd="/", env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(tmp_path / "teamlora-home-12345")
