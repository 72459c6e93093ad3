"""A checkpoint's folder: whole or not there, found again, and any damage seen."""

import hashlib
import json
import os

import pytest

from trainer.checkpoint import storage

CONTENT = {"run.json": b'{"step": 3}', "state-00001.safetensors": bytes(range(200)), "more.bin": b"x"}


def publish(folder, step):
    draft = storage.CheckpointWriter(folder, step)
    for name, content in CONTENT.items():
        draft.add(name, content)
    return draft.publish()


@pytest.fixture
def checkpoint(tmp_path):
    return publish(tmp_path / "checkpoints", 3)


def test_what_was_published_is_whole_and_named_as_the_latest(checkpoint):
    assert storage.verify(checkpoint) is None
    assert {path.name: path.read_bytes() for path in checkpoint.iterdir() if path.name != storage.INDEX} == CONTENT
    assert (checkpoint.parent / "latest").read_text() == "step-000003\n"
    assert storage.steps_in(checkpoint.parent) == [3]


def test_a_draft_that_was_not_published_is_no_checkpoint_and_is_swept_away(tmp_path):
    publish(tmp_path, 1)
    storage.CheckpointWriter(tmp_path, 2).add("run.json", b"half")
    assert storage.steps_in(tmp_path) == [1]
    assert (tmp_path / "latest").read_text() == "step-000001\n"
    storage.sweep(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"step-000001", "latest"}


@pytest.mark.parametrize("name", [*CONTENT, storage.INDEX])
def test_every_flipped_byte_of_every_file_is_seen_or_changes_nothing(checkpoint, name):
    path = checkpoint / name
    whole = path.read_bytes()
    read = json.loads((checkpoint / storage.INDEX).read_bytes())
    for position in range(len(whole)):
        spoilt = bytearray(whole)
        spoilt[position] ^= 1 << position % 8
        path.write_bytes(spoilt)
        if storage.verify(checkpoint) is None:  # white space of the index, say
            assert name == storage.INDEX and json.loads(bytes(spoilt)) == read
    path.write_bytes(whole)
    assert storage.verify(checkpoint) is None


@pytest.mark.parametrize("name", [*CONTENT, storage.INDEX])
def test_a_truncated_or_missing_file_is_named(checkpoint, name):
    path = checkpoint / name
    os.truncate(path, path.stat().st_size - 1)
    assert name in storage.verify(checkpoint)
    path.unlink()
    assert name in storage.verify(checkpoint)


def test_the_newest_good_one_is_found_behind_damaged_ones(tmp_path):
    for step in (1, 2, 3):
        publish(tmp_path, step)
    (tmp_path / "step-000003" / "run.json").unlink()
    found = list(storage.newest_intact(tmp_path))
    assert [(folder.name, problem is None) for folder, problem in found] == [
        ("step-000003", False), ("step-000002", True),
    ]  # fmt: skip


def test_a_step_saved_again_takes_the_place_of_the_earlier_one(tmp_path):
    (publish(tmp_path, 1) / "run.json").write_bytes(b"damaged")
    assert storage.verify(publish(tmp_path, 1)) is None


def test_pruning_leaves_the_newest_the_multiples_and_those_named(tmp_path):
    for step in range(1, 11):
        publish(tmp_path, step)
    storage.prune(tmp_path, 10, keep_last=2, keep_every=4, keep=[3])
    assert storage.steps_in(tmp_path) == [3, 4, 8, 9, 10]
    assert {path.name for path in tmp_path.iterdir() if path.name.startswith(".")} == set()


def test_damaged_ones_that_were_passed_over_take_no_new_ones_place(tmp_path):
    for step in (100, 130, 150):
        publish(tmp_path, step)
    storage.prune(tmp_path, 130, keep_last=1, keep_every=None, keep=[])
    assert storage.steps_in(tmp_path) == [130, 150]


def test_links_to_checkpoints_are_checkpoints_and_are_removed_as_links(tmp_path):
    checkpoints, elsewhere = tmp_path / "checkpoints", tmp_path / "elsewhere"
    for step in (1, 2):
        publish(checkpoints, step)
    (checkpoints / "step-000001").rename(elsewhere)
    (checkpoints / "step-000001").symlink_to(elsewhere)
    assert storage.steps_in(checkpoints) == [1, 2]
    storage.prune(checkpoints, 2, keep_last=1, keep_every=None, keep=[])
    assert storage.steps_in(checkpoints) == [2] and storage.verify(elsewhere) is None
    (checkpoints / "step-000003").symlink_to(tmp_path / "not mounted")
    (newest, problem), (older, intact) = storage.newest_intact(checkpoints)
    assert newest.name == "step-000003" and "cannot be read" in problem
    assert older.name == "step-000002" and intact is None
    assert storage.verify(publish(checkpoints, 3)) is None, "saved in place of the link"


def test_a_pointer_may_be_a_link(tmp_path):
    publish(tmp_path, 7)
    (tmp_path / "best").symlink_to("step-000007")
    assert storage.read_pointer(tmp_path, storage.BEST) == 7


def test_only_files_of_the_index_are_read(checkpoint):
    (checkpoint / "state-00001.bak.safetensors").write_bytes(b"a copy by hand")
    assert storage.tensor_files(checkpoint) == [checkpoint / "state-00001.safetensors"]


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/b", "..", ""])
def test_an_index_that_names_files_elsewhere_is_no_intact_checkpoint(checkpoint, name):
    files = {name: {"bytes": 1, "sha256": hashlib.sha256(b"x").hexdigest()}}
    digest = hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()
    (checkpoint / storage.INDEX).write_text(json.dumps({"files": files, "sha256": digest}))
    (checkpoint.parent / "secret").write_bytes(b"x")
    assert storage.verify(checkpoint) == f"index.json names {name!r}, where files of its folder are expected"


def test_a_partial_save_that_cannot_be_removed_is_in_no_later_ones_way(tmp_path, monkeypatch):
    storage.CheckpointWriter(tmp_path, 1).add("run.json", b"half")
    monkeypatch.setattr("shutil.rmtree", lambda *_, **__: None)
    assert storage.verify(publish(tmp_path, 1)) is None
