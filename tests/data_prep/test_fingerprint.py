"""A prepared set records the libraries that decided its content."""

from importlib.metadata import PackageNotFoundError

import pytest

from data_prep import fingerprint
from data_prep.config import DataConfig
from data_prep.fingerprint import library_versions
from data_prep.user_error import UserError

FILES = {"type": "files", "task": "own", "path": "own.jsonl"}
GYM = {"type": "reasoning_gym", "task": "sums", "generator": "basic_arithmetic", "count": 5}


def config(tmp_path, *sources) -> DataConfig:
    return DataConfig(prepared_dir=tmp_path, seq_len=64, sources=sources)


@pytest.fixture
def no_reasoning_gym(monkeypatch):
    def version(name: str) -> str:
        if name == "reasoning-gym":
            raise PackageNotFoundError(name)
        return "1"

    monkeypatch.setattr(fingerprint, "version", version)


def test_files_are_prepared_without_reasoning_gym(no_reasoning_gym, tmp_path):
    assert "reasoning-gym" not in library_versions(config(tmp_path, FILES))


def test_its_tasks_without_it_are_refused_with_what_installs_it(no_reasoning_gym, tmp_path):
    with pytest.raises(UserError, match=r"^data.sources: .* reasoning-gym, .* `pip install 'teamlora\[sample\]'`"):
        library_versions(config(tmp_path, FILES, GYM))
