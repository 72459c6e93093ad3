import errno
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

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


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.EMFILE, errno.EPERM])
def test_a_disk_that_renames_no_folders_is_refused_before_the_work(tmp_path, monkeypatch, number):
    """As object stores: they rename empty folders only, or none."""
    rename = os.rename

    def fail(source, target):
        if any(Path(source).iterdir()):
            raise OSError(number, os.strerror(number), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    line = (
        rf"^--to: cannot write {tmp_path}/folder \(its file system cannot rename folders: .*\); give a folder that can"
    )
    with pytest.raises(UserError, match=line), blame_option("--to", tmp_path / "folder"):  # noqa: SIM117
        with publish_atomically(tmp_path / "folder"):
            pytest.fail("the work was begun")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_in_a_layer_of_an_image_is_refused_before_the_work(tmp_path, monkeypatch):
    write(tmp_path / "folder", "old")
    rename = os.rename

    def fail(source, target):
        if source == tmp_path / "folder":
            raise OSError(errno.EXDEV, os.strerror(errno.EXDEV), str(source))
        rename(source, target)

    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="it cannot be renamed: Invalid cross-device link"):
        write(tmp_path / "folder", "new")
    assert (tmp_path / "folder" / "one").read_text() == "old"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


MOUNTED = """
import sys
from pathlib import Path
from data_prep.publish import blame_option, publish_atomically
folder = Path(sys.argv[1])
try:
    with blame_option("--to", folder), publish_atomically(folder):
        print("the work was begun")
except ValueError as error:
    print(error)
with publish_atomically(folder / "new") as staging:
    (staging / "one").touch()
print(*sorted(path.name for path in folder.iterdir()))
"""


def test_a_mount_point_is_refused_before_the_work_and_a_folder_in_it_works(tmp_path):
    folder = tmp_path / "mount point"
    folder.mkdir()
    bind = ["unshare", "--mount", "sh", "-c", 'mount --bind "$0" "$0" && exec "$@"', str(folder)]
    if subprocess.run([*bind, "true"], capture_output=True).returncode:
        pytest.skip("mounting is not allowed here")
    done = subprocess.run(
        [*bind, sys.executable, "-c", MOUNTED, str(folder)],
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    assert done.stdout.splitlines() == [
        f"--to: cannot write {folder} (it cannot be renamed: Device or resource busy); it is a mount point, which "
        f"cannot be replaced; give a folder in it, such as {folder / 'new'}",
        "new",
    ]


def test_leftovers_that_cannot_be_removed_are_named_and_in_nobodys_way(tmp_path, monkeypatch, capsys):
    """As on NFS while another process has files of the old folder open; in containers a later pid is often the same."""
    write(tmp_path / "folder", "1")
    remove = shutil.rmtree

    def fail(path, *arguments, **options):
        if not str(path).endswith(".old"):
            return remove(path, *arguments, **options)
        if not options.get("ignore_errors"):
            raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY), str(path))

    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", fail)
        write(tmp_path / "folder", "2")
        write(tmp_path / "folder", "3")
    left = [tmp_path / f".folder.{HOST}.{os.getpid()}{number}.old" for number in ("", "-2")]
    assert capsys.readouterr().err.splitlines() == [
        f"warning: {path} could not be removed (Directory not empty)" for path in left
    ]
    write(tmp_path / "folder", "4")
    assert (tmp_path / "folder" / "one").read_text() == "4"
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]
