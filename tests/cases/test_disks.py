"""Disks and containers as people have them: without locks or folder syncs, with files in use, links and limits."""

import errno
import fcntl
import json
import os
import shutil
import stat
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_prep.prepared_folder import exclusive_preparation
from data_prep.publish import publish_atomically
from data_prep.resource_limits import available_memory
from data_prep.user_error import UserError
from tests.support import scene
from trainer.checkpoint import storage
from trainer.checkpoint.manager import FACTS, FOLDER, CheckpointManager
from trainer.recipe import CheckpointConfig
from trainer.run import run_dir
from trainer.telemetry.metrics import METRICS, MetricsWriter
from trainer.training.resume import find_resume_point
from trainer.training.train import _begin_run_dir


def raising(number: int, when=lambda *_: True, otherwise=None):
    """A function that fails with this errno on some arguments, and else does what `otherwise` does."""

    def call(*arguments, **options):
        if when(*arguments):
            raise OSError(number, os.strerror(number))
        return otherwise(*arguments, **options)

    return call


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL])
def test_a_file_system_without_locks_gives_a_warning_and_the_set_is_prepared(tmp_path, monkeypatch, number):
    """Case 23-flock-not-supported."""
    monkeypatch.setattr(fcntl, "flock", raising(number))
    said: list[str] = []
    with exclusive_preparation(tmp_path / "prepared", said.append), publish_atomically(tmp_path / "prepared") as folder:
        (folder / "rows").touch()
    assert (tmp_path / "prepared" / "rows").is_file()
    (line,) = said
    assert line.startswith(f"warning: {tmp_path / 'prepared'}: its file system has no locks ({os.strerror(number)})")


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF, errno.EPERM, errno.EACCES, errno.ENOSYS])
def test_a_file_system_that_syncs_no_folder_keeps_sets_and_checkpoints(tmp_path, monkeypatch, number):
    """Case 24-fsync-of-a-folder."""
    fail = raising(number, lambda handle: stat.S_ISDIR(os.fstat(handle).st_mode), os.fsync)
    monkeypatch.setattr(os, "fsync", fail)
    with publish_atomically(tmp_path / "set") as folder:
        (folder / "inner").mkdir()
        (folder / "inner" / "rows").write_text("all")
    assert (tmp_path / "set" / "inner" / "rows").read_text() == "all"
    assert storage.verify(save(tmp_path / FOLDER, 1)) is None


@pytest.mark.parametrize("number", [errno.EIO, errno.ENOSPC])
def test_a_disk_that_fails_is_no_file_system_without_syncs(tmp_path, monkeypatch, number):
    monkeypatch.setattr(os, "fsync", raising(number))
    with pytest.raises(OSError, match=os.strerror(number)), publish_atomically(tmp_path / "set"):
        pass
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match=os.strerror(number)):
        save(tmp_path, 1)
    assert storage.steps_in(tmp_path) == []


def save(checkpoints: Path, step: int, **facts: object) -> Path:
    """A checkpoint as a run of `keep_last: 1` leaves it, with the ones before removed."""
    writer = storage.CheckpointWriter(checkpoints, step)
    writer.add(FACTS, json.dumps({"step": step, "metrics_bytes": 10 * step, **facts}).encode())
    CheckpointManager(None, checkpoints, CheckpointConfig(keep_last=1))._finish(step, None, writer)
    return checkpoints / storage.folder_name(step)


@pytest.mark.parametrize("number", [errno.ENOTEMPTY, errno.EBUSY, errno.EPERM])
def test_a_checkpoint_that_cannot_be_removed_is_named_and_the_next_one_counts(tmp_path, monkeypatch, capsys, number):
    """Case 26-removing-old-checkpoints-on-nfs. An error here would count as a failed save, and end in status 1."""
    save(tmp_path, 1)
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", raising(number))
        assert storage.verify(save(tmp_path, 2)) is None
    left = tmp_path / ".step-000001.old"
    assert capsys.readouterr().err == f"warning: {left} could not be removed ({os.strerror(number)})\n"
    assert storage.steps_in(tmp_path) == [2] and storage.read_pointer(tmp_path, storage.LATEST) == 2
    save(tmp_path, 3)
    assert storage.steps_in(tmp_path) == [3] and not left.exists(), "tried again, once nothing uses it"


def test_a_checkpoint_that_cannot_be_renamed_stays_one_and_is_named(tmp_path, monkeypatch, capsys):
    old = save(tmp_path, 1)
    fail = raising(errno.EBUSY, lambda source, _: Path(source) == old, os.rename)
    monkeypatch.setattr(os, "rename", fail)
    save(tmp_path, 2)
    assert capsys.readouterr().err == f"warning: {old} could not be removed (Device or resource busy)\n"
    assert storage.steps_in(tmp_path) == [1, 2] and storage.verify(old) is None


def test_the_limit_of_a_container_counts_in_place_of_the_hosts_memory(tmp_path, monkeypatch):
    """Case 43-memory-limit-of-the-container: 4 GiB, of which 1 GiB is in use, on a host with 100 GiB free."""
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * 2**30))
    group = tmp_path / "sys" / "fs" / "cgroup"
    group.mkdir(parents=True)
    (group / "memory.max").write_text(f"{4 * 2**30}\n")
    (group / "memory.current").write_text(f"{2**30}\n")
    assert available_memory(tmp_path) == 3 * 2**30


def test_checkpoints_on_a_disk_that_cannot_rename_are_refused_before_the_run_begins(tmp_path, monkeypatch):
    recipe = scene.recipe("base", run__output_dir=str(tmp_path / "runs"))
    disk, run = tmp_path / "disk", recipe.run.directory
    disk.mkdir()
    run.mkdir(parents=True)
    (run / FOLDER).symlink_to(disk)
    monkeypatch.setattr(os, "rename", raising(errno.EOPNOTSUPP, lambda path, _: disk in Path(path).parents, os.rename))
    prepared = SimpleNamespace(manifest={"key": "k"})
    plan = SimpleNamespace(
        batches=SimpleNamespace(world_size=1), opened=SimpleNamespace(fingerprint="f"), prepared=prepared
    )
    message = rf"^run\.output_dir=.*: cannot write {run / FOLDER} \(its file system cannot rename folders: .*\); give"
    with pytest.raises(UserError, match=message):
        _begin_run_dir(recipe, plan, "cpu", SimpleNamespace(step=0, notes=[]))
    assert list(run.iterdir()) == [run / FOLDER] and list(disk.iterdir()) == [], "nothing is left"


@pytest.mark.parametrize("linked", ["run", "checkpoints", "step"])
def test_a_run_with_linked_folders_keeps_the_metrics_of_its_steps(tmp_path, linked):
    recipe = scene.recipe("base", run__output_dir=str(tmp_path / "runs"))
    run = recipe.run.directory
    run_dir.create(recipe, {})
    writer = MetricsWriter(run, tensorboard=False)
    for step in (1, 2):
        writer.write({"step": step})
        kept = writer.position()
    save(run / FOLDER, 2, recipe=recipe.model_dump(mode="json"), metrics_bytes=kept)
    writer.write({"step": 3})
    writer.close()

    moved = {"run": run, "checkpoints": run / FOLDER, "step": run / FOLDER / "step-000002"}[linked]
    moved.rename(tmp_path / "elsewhere")
    moved.symlink_to(tmp_path / "elsewhere")
    found = find_resume_point(recipe)
    assert found.step == 2
    MetricsWriter(run, tensorboard=False, step=2, own=found.is_of(run)).close()
    assert [json.loads(line)["step"] for line in (run / METRICS).read_text().splitlines()] == [1, 2]
