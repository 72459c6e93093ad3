"""How a rank leaves the others, and whom it blames. NCCL is played by its name and its texts: it needs GPUs."""

import resource
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from deepspeed.accelerator import get_accelerator

from data_prep.user_error import UserError
from trainer.distributed.process_group import process_group, translate_peer_errors
from trainer.errors import LostRank, OwnFault, TrainingFault

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
    [(NO_ROOM, OwnFault), ("socketProgress: Connection closed by remote peer node-b<40112>", LostRank)],
)
def test_the_cause_that_nccl_tells_last_is_told_and_no_other_rank_is_blamed_for_ones_own(monkeypatch, cause, kind):
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(TrainingFault) as caught, translate_peer_errors("step 3"):
        raise dist.DistBackendError(SYSTEM + cause)
    assert type(caught.value) is kind
    assert str(caught.value).startswith("step 3, rank 1: ")
    assert f"ncclSystemError: {cause}" in str(caught.value)


DUPLICATE = """NCCL error in: /pytorch/torch/csrc/distributed/c10d/NCCLUtils.hpp:268, invalid usage (run with \
NCCL_WARN=1 for details), NCCL version 2.27.5
ncclInvalidUsage: This usually reflects invalid usage of NCCL library.
Last error:
Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"""


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (DUPLICATE, "ncclInvalidUsage: Duplicate GPU detected : rank 1 and rank 0 both on CUDA device 1000"),
        (SYSTEM + NO_ROOM, f"ncclSystemError: {NO_ROOM}"),
    ],
)
def test_a_fault_of_nccls_own_at_the_start_is_told_with_its_cause(monkeypatch, text, told):
    def fail(timeout: object) -> None:
        raise dist.DistBackendError(text)

    monkeypatch.setattr("trainer.distributed.process_group._start_process_group", fail)
    with pytest.raises(TrainingFault) as caught, process_group():
        pass
    assert type(caught.value) is OwnFault
    assert f": NCCL does not start: {told}; see docs/gpu.md" in str(caught.value)
    assert str(caught.value).startswith("rank 0 of 1 on ")


@pytest.mark.parametrize(("kind", "asked"), [("cuda", 0), ("cpu", 1)])
def test_deepspeeds_ops_are_looked_up_only_on_a_cpu(monkeypatch, kind, asked):
    """Where nvcc is missing the look-up warns once for each op (deepspeed.ops.op_builder.builder)."""
    looked_up, started = [], []
    module = "trainer.distributed.process_group"
    monkeypatch.setattr(f"{module}.compute_device", lambda: torch.device(kind))
    monkeypatch.setattr(f"{module}.take_gpu", lambda local_rank: torch.device("cuda", local_rank))
    monkeypatch.setattr(f"{module}.disable_cpu_op_build", lambda: looked_up.append(True))
    monkeypatch.setattr("deepspeed.init_distributed", lambda **given: started.append(given["dist_backend"]))
    with process_group() as device:
        assert device.type == kind
    assert len(looked_up) == asked
    assert started == [{"cuda": "nccl", "cpu": "gloo"}[kind]]


def test_a_step_goes_on_where_no_file_descriptor_is_left_to_read_the_memory_with():
    with process_group():
        ask = get_accelerator().memory_stats  # as DeepSpeed's stage3.py does after each step
        known, limits = ask(), resource.getrlimit(resource.RLIMIT_NOFILE)
        resource.setrlimit(resource.RLIMIT_NOFILE, (0, limits[1]))
        try:
            with pytest.raises(OSError, match="Too many open files"):
                Path("/proc/self/stat").read_text()
            assert ask()["allocated_bytes.all.current"] == known["allocated_bytes.all.peak"]
        finally:
            resource.setrlimit(resource.RLIMIT_NOFILE, limits)
