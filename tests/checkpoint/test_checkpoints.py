"""Which checkpoints stay."""

from trainer.checkpoint import files
from trainer.checkpoint.checkpoints import Checkpoints
from trainer.recipe import CheckpointConfig


def publish(folder, step, best):
    Checkpoints(None, folder, CheckpointConfig(keep_last=1))._finish(best, files.Draft(folder, step))


def test_the_best_stays_and_is_named_also_while_a_better_ones_save_has_failed(tmp_path):
    publish(tmp_path, 100, best=100)
    assert files.pointed_at(tmp_path, files.BEST) == 100
    publish(tmp_path, 300, best=200)  # what was to be saved at 200 is not there
    assert files.steps_in(tmp_path) == [100, 300]
    assert files.pointed_at(tmp_path, files.BEST) == 100
    publish(tmp_path, 400, best=400)
    assert files.steps_in(tmp_path) == [400]
    assert files.pointed_at(tmp_path, files.BEST) == 400


def test_without_a_held_out_loss_none_is_the_best(tmp_path):
    publish(tmp_path, 1, best=None)
    assert files.pointed_at(tmp_path, files.BEST) is None
    assert files.pointed_at(tmp_path, files.LATEST) == 1
