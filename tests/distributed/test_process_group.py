"""How a rank leaves the others, and whom it blames. NCCL is played by its name and its texts: it needs GPUs."""

import pytest
import torch.distributed as dist

from data_prep.user_error import UserError
from trainer.distributed.process_group import process_group, translate_peer_errors
from trainer.errors import LostRank, TrainingFault

SYSTEM = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.cpp:77, unhandled system error (run with \
NCCL_DEBUG=INFO for details), NCCL version 2.27.5
ncclSystemError: System call (e.g. socket, malloc) or external library call failed or device error.
Last error:
"""
NO_ROOM = "Error while creating shared memory segment /dev/shm/nccl-1, error: No space left on device (28)"


@pytest.mark.parametrize(("error", "stays"), [(ValueError, True), (UserError, False)])
def test_nccl_is_not_said_goodbye_to_after_an_error_of_one_rank_alone(monkeypatch, error, stays):
    monkeypatch.setattr(dist, "get_backend", lambda: "nccl")
    with pytest.raises(error), process_group():
        raise error("mine")
    assert dist.is_initialized() == stays
    if stays:
        dist.destroy_process_group()


def test_gloo_is_always_left():
    with pytest.raises(ValueError, match="mine"), process_group():
        raise ValueError("mine")
    assert not dist.is_initialized()


@pytest.mark.parametrize(
    ("cause", "kind"),
    [(NO_ROOM, TrainingFault), ("socketProgress: Connection closed by remote peer node-b<40112>", LostRank)],
)
def test_the_cause_that_nccl_tells_last_is_told_and_no_other_rank_is_blamed_for_ones_own(monkeypatch, cause, kind):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TrainingFault) as caught, translate_peer_errors("step 3"):
        raise dist.DistBackendError(SYSTEM + cause)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("step 3, rank 1: ")
    assert f"ncclSystemError: {cause}" in str(caught.value)
