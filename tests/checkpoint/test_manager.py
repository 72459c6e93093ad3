"""Which checkpoints stay."""

import json

import pytest

from trainer.checkpoint import storage
from trainer.checkpoint.manager import FACTS, CheckpointManager, find_best
from trainer.recipe import CheckpointConfig


def publish(folder, step, best):
    draft = storage.CheckpointWriter(folder, step)
    draft.add(FACTS, json.dumps({"held_out": {"best_loss": 1.5}}).encode())
    CheckpointManager(None, folder, CheckpointConfig(keep_last=1))._finish(step, best, draft)


def test_the_best_stays_and_is_named_also_while_a_better_ones_save_has_failed(tmp_path):
    publish(tmp_path, 100, best=100)
    assert storage.read_pointer(tmp_path, storage.BEST) == 100
    publish(tmp_path, 300, best=200)  # what was to be saved at 200 is not there
    assert storage.steps_in(tmp_path) == [100, 300]
    assert storage.read_pointer(tmp_path, storage.BEST) == 100
    publish(tmp_path, 400, best=400)
    assert storage.steps_in(tmp_path) == [400]
    assert storage.read_pointer(tmp_path, storage.BEST) == 400


def test_without_a_held_out_loss_none_is_the_best(tmp_path):
    publish(tmp_path, 1, best=None)
    assert storage.read_pointer(tmp_path, storage.BEST) is None
    assert storage.read_pointer(tmp_path, storage.LATEST) == 1
    step, told = find_best(tmp_path)
    assert step is None
    assert told == f"warning: {tmp_path} names no best checkpoint; the adapter is that of the last step"


def test_a_damaged_best_is_told_and_not_taken(tmp_path):
    publish(tmp_path, 100, best=100)
    assert find_best(tmp_path) == (
        100,
        "best            step 100, held-out loss 1.5000: the adapter is that of this step",
    )
    (tmp_path / "step-000100" / FACTS).write_text("{}")
    step, told = find_best(tmp_path)
    assert step is None
    assert f"step-000100 is the best, but {FACTS} has 2 bytes instead of" in told


def test_a_save_is_begun_and_published_only_after_asking(tmp_path):
    def before_write() -> None:
        raise OSError("lost")

    asking = CheckpointManager(None, tmp_path / "checkpoints", CheckpointConfig(), before_write)
    with pytest.raises(OSError, match="lost"):
        asking._start(1, "{}")
    assert list(tmp_path.iterdir()) == []
    writer = CheckpointManager(None, tmp_path / "checkpoints", CheckpointConfig())._start(1, "{}")
    with pytest.raises(OSError, match="lost"):
        asking._finish(1, None, writer)
    assert storage.steps_in(tmp_path / "checkpoints") == []
