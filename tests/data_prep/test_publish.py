import os
import socket
import subprocess
import sys

import pytest

from data_prep.publish import blame_option, publish_atomically, sweep
from data_prep.user_error import UserError

HOST = socket.gethostname()


def write(folder, text="all"):
    with publish_atomically(folder) as staging:
        (staging / "one").write_text(text)
        (staging / "below").mkdir()
        (staging / "below" / "two").write_text(text)


def test_a_folder_is_there_when_the_block_has_ended_and_not_before(tmp_path):
    folder = tmp_path / "made" / "folder"
    with publish_atomically(folder) as staging:
        (staging / "one").write_text("all")
        assert not folder.exists()
    assert (folder / "one").read_text() == "all"
    assert [path.name for path in folder.parent.iterdir()] == ["folder"]


def test_an_old_folder_is_replaced_entirely(tmp_path):
    write(tmp_path / "folder", "old")
    (tmp_path / "folder" / "of old").touch()
    write(tmp_path / "folder", "new")
    assert sorted(path.name for path in (tmp_path / "folder").iterdir()) == ["below", "one"]
    assert (tmp_path / "folder" / "below" / "two").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_an_error_leaves_the_old_folder_and_nothing_else(tmp_path):
    write(tmp_path / "folder", "old")
    with pytest.raises(ZeroDivisionError), publish_atomically(tmp_path / "folder") as staging:
        (staging / "one").write_text("new")
        raise ZeroDivisionError
    assert (tmp_path / "folder" / "one").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_a_link_to_a_folder_stays_one(tmp_path):
    write(tmp_path / "folder", "old")
    (tmp_path / "link").symlink_to(tmp_path / "folder")
    write(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink() and (tmp_path / "folder" / "one").read_text() == "new"


def test_leftovers_of_ended_processes_are_removed_and_of_no_others(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for name in ("new", "old"):
        (tmp_path / f".folder.{HOST}.{gone.pid}.{name}").mkdir()
    others = [
        f".folder.{HOST}.{os.getppid()}.new",  # a process that still writes
        f".folder.elsewhere.{gone.pid}.new",  # another machine, of whose processes nothing is known
        f".folder2.{HOST}.{gone.pid}.new",
        f"folder.{HOST}.{gone.pid}.new",
    ]
    for name in others:
        (tmp_path / name).mkdir()
    write(tmp_path / "folder")
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *others}
    sweep(tmp_path / "folder", locked=True)
    assert {path.name for path in tmp_path.iterdir()} == {"folder", *others[1:]}


def test_a_name_is_not_read_as_a_pattern(tmp_path):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    for folder in ("[ab]", "a"):
        (tmp_path / f".{folder}.{HOST}.{gone.pid}.new").mkdir()
    write(tmp_path / "[ab]")
    assert {path.name for path in tmp_path.iterdir()} == {"[ab]", f".a.{HOST}.{gone.pid}.new"}


def test_a_failure_to_write_names_the_option(tmp_path):
    (tmp_path / "file").touch()
    with (
        pytest.raises(
            UserError, match=r"^--to: cannot write .*/file/folder \(Not a directory\); give a folder that can"
        ),
        blame_option("--to", tmp_path / "file" / "folder"),
    ):
        write(tmp_path / "file" / "folder")
