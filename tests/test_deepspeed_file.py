"""Which file deepspeed.config means: a path, or the name of a file in ds_configs, from any working directory."""

import sys
from pathlib import Path

import pytest

import trainer.deepspeed_file
from data_prep.user_error import UserError
from trainer.deepspeed_file import find_deepspeed_config

SHIPPED = Path(__file__).resolve().parents[1] / "ds_configs"


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch) -> Path:
    """The working directory, which is not the repository."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("value", ["zero3", "ds_configs/zero3.json", SHIPPED / "zero3.json"])
def test_shipped_files_are_found_from_anywhere(value):
    assert find_deepspeed_config(Path(value)) == SHIPPED / "zero3.json"


@pytest.mark.parametrize("value", ["zero3", "ds_configs/zero3.json", "zero3.json", "own/zero3.json"])
def test_a_file_at_the_given_path_comes_first(elsewhere, value):
    (elsewhere / value).parent.mkdir(exist_ok=True)
    (elsewhere / value).write_text("{}")
    assert find_deepspeed_config(Path(value)) == Path(value)


def test_a_folder_of_the_same_name_is_not_the_file(elsewhere):
    (elsewhere / "zero3").mkdir()
    assert find_deepspeed_config(Path("zero3")) == SHIPPED / "zero3.json"


@pytest.mark.parametrize("value", ["zero4", "zero3.json", "ds_configs/zero4.json", "own/zero3.json", "/no/zero3.json"])
def test_an_unknown_file_is_refused_with_the_known_names(value):
    with pytest.raises(UserError) as caught:
        find_deepspeed_config(Path(value))
    assert str(caught.value) == (
        f"deepspeed.config={value}: No such file or directory; give a DeepSpeed JSON file, or one of "
        "single, zero2, zero3, zero3_offload"
    )


def test_a_folder_is_refused(elsewhere):
    with pytest.raises(UserError, match=r"^deepspeed\.config=\.: Is a directory; give a DeepSpeed JSON file"):
        find_deepspeed_config(Path("."))


def test_without_a_repository_the_installed_files_are_found(elsewhere, monkeypatch):
    """As in a wheel, whose package data holds them as trainer.ds_configs."""
    package = elsewhere / "site-packages" / "trainer"
    (package / "ds_configs").mkdir(parents=True)
    (package / "ds_configs" / "zero3.json").write_text("{}")
    monkeypatch.setattr(trainer.deepspeed_file, "__file__", str(package / "deepspeed_file.py"))
    monkeypatch.setattr(trainer, "__path__", [str(package)])
    try:
        assert find_deepspeed_config(Path("zero3")) == package / "ds_configs" / "zero3.json"
    finally:
        sys.modules.pop("trainer.ds_configs")


def test_without_any_shipped_files_a_name_is_refused(elsewhere, monkeypatch):
    def no_package(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(trainer.deepspeed_file, "__file__", str(elsewhere / "trainer" / "deepspeed_file.py"))
    monkeypatch.setattr(trainer.deepspeed_file, "files", no_package)
    with pytest.raises(UserError, match=r"^deepspeed\.config=zero3: No such file"):
        find_deepspeed_config(Path("zero3"))
