"""What is refused before a base is opened."""

import pytest

from data_prep.user_error import UserError
from tests.support import scene
from trainer.training.run_plan import check_offload


@pytest.fixture(autouse=True)
def no_gpu(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


def recipe(**changes):
    return scene.recipe("base", train__activation_checkpointing="offload", **changes)


def test_activations_cannot_leave_a_gpu_that_is_not_there():
    with pytest.raises(UserError) as caught:
        check_offload(recipe())
    assert str(caught.value) == (
        "train.activation_checkpointing=offload: needs a GPU, and this machine has none; use true, or try it on this "
        "CPU with run.debug=true"
    )


def test_debug_lets_them_stay_where_they_are():
    check_offload(recipe(run__debug=True))
    check_offload(scene.recipe("base", train__activation_checkpointing=True))


def test_a_gpu_takes_them(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    check_offload(recipe())
