"""The process group of a launch: how ranks meet, and how the loss of one is reported."""

import contextlib
import os
import socket
import traceback
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import torch
import torch.distributed as dist

from data_prep.user_error import UserError
from trainer.distributed.deepspeed_internals import disable_cpu_op_build, tolerate_unread_memory
from trainer.distributed.network import interface_to
from trainer.errors import LostRank, OwnFault, Stopped, TrainingFault
from trainer.run.gpu import compute_device, take_gpu

# What a launcher would set; without one the run is a group of one rank on any free port.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

BACKENDS = {"cuda": "nccl", "cpu": "gloo"}  # by type of device

# Words in gloo's and NCCL's errors about connections, for which torch has no type.
LOST_CONNECTION = (
    "gloo",
    "connection closed by peer",
    "connection reset by peer",
    "nccl",
    "timed out waiting",
    "pair closure",
)

# NCCL's names for faults of this rank's own machine or set-up, unless the text mentions a peer.
OWN_FAULTS = ("ncclInvalidUsage", "ncclUnhandledCudaError", "ncclInternalError", "ncclSystemError")


@contextlib.contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[torch.device]:
    """Joins the ranks that the launcher started, or makes a group of one, and yields this rank's device.

    timeout: how long ranks wait for one another, to meet and in each collective; None: torch's half hour. Raises
    LostRank where they do not meet, TrainingFault where the port to meet at is taken, OwnFault where this rank's NCCL
    fails, UserError where this rank has no GPU of its own on a machine that has some.

    The group is destroyed also after an error that every rank raises: with gloo's threads alive the process would
    abort. Destroying an NCCL group waits for all ranks, so after an error of this rank alone it is skipped: the others
    must notice.
    """
    alone = {} if "RANK" in os.environ else ALONE
    os.environ.update(alone)
    together = True
    try:
        with _translate_meeting_errors(timeout):
            device = _start_process_group(timeout)
        yield device
    except BaseException as error:
        together = isinstance(error, (UserError, Stopped))
        raise
    finally:
        if dist.is_initialized() and (together or dist.get_backend() != "nccl"):
            dist.destroy_process_group()
        for name in alone:
            del os.environ[name]


@contextlib.contextmanager
def _translate_meeting_errors(timeout: timedelta | None) -> Iterator[None]:
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    rank = f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}"
    try:
        yield
    except RuntimeError as error:
        text = _reason(error)
        if "EADDRINUSE" in text:
            raise TrainingFault(  # not a user's mistake: the next start of a supervised launch takes another port
                f"the ranks cannot meet at {place}: the port is taken, perhaps by a rank that an earlier launch left "
                "behind; start again, or give the launcher another port (--master_port N)"
            ) from None
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
            raise
        # With several ranks DeepSpeed binds a device, so NCCL connects here and not at the first collective.
        if _is_own_fault(text):
            raise OwnFault(f"{rank}: NCCL does not start: {text[:300]}; see docs/gpu.md") from error
        limit = f" within run.start_timeout={timeout.total_seconds():g} s" if timeout is not None else ""
        raise LostRank(
            f"{rank}: the ranks did not meet at {place}{limit} ({text[:200]}); a node did not start, or cannot reach "
            "that address and port"
        ) from error


def _start_process_group(timeout: timedelta | None = None) -> torch.device:
    """Joins the ranks that the environment describes and returns this rank's device."""
    device = compute_device()
    if device.type == "cuda":
        device = take_gpu(int(os.environ["LOCAL_RANK"]))
    import deepspeed

    if device.type == "cpu":  # on a GPU there is no such op, and to ask for it warns of each op that lacks nvcc
        disable_cpu_op_build()
        tolerate_unread_memory()
    if (interface := interface_to(os.environ["MASTER_ADDR"])) not in (None, "lo"):
        # by default gloo takes the address of the host's own name, which is 127.0.1.1 on Debian
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    limit = {"timeout": timeout} if timeout is not None else {}
    deepspeed.init_distributed(dist_backend=BACKENDS[device.type], verbose=False, **limit)
    return device


def set_collective_timeout(timeout: timedelta) -> None:
    """Sets how long collectives of all process groups wait for a rank that does not answer, from now on."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def translate_peer_errors(doing: str) -> Iterator[None]:
    """Turns what torch.distributed raises where another rank is gone or stuck into a LostRank. doing: when it was."""
    try:
        yield
    except TrainingFault:
        raise
    except RuntimeError as error:
        text = _reason(error)
        if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in LOST_CONNECTION):
            raise
        if _is_own_fault(text):
            raise OwnFault(f"{doing}, rank {os.environ['RANK']}: {text[:300]}") from error
        raise LostRank(
            f"{doing}, rank {os.environ['RANK']}: another rank has ended or does not answer in {_operation(error)} "
            f"({text[:200]}); look for that rank's own message; if it has none, it was killed (out of memory?)"
        ) from error


def _is_own_fault(text: str) -> bool:
    """Whether the text of an error of NCCL is about this rank's own machine or set-up."""
    return any(word in text for word in OWN_FAULTS) and "peer" not in text


def _reason(error: BaseException) -> str:
    """The error's text on one line. NCCL's begins with a place in torch's source and ends with the cause."""
    text = " ".join(str(error).split())
    place, last, cause = text.partition("Last error:")
    kind = next((word for word in OWN_FAULTS if word in place), "NCCL error")
    return f"{kind}: {cause.strip()}" if last and cause.strip() else text


def _operation(error: BaseException) -> str:
    """The function of torch.distributed that raised the error, from its traceback."""
    frames = traceback.extract_tb(error.__traceback__)
    calls = [frame.name for frame in frames if Path(frame.filename).name == "distributed_c10d.py"]
    if calls:
        return calls[-1]
    return f"line {frames[-1].lineno} of {Path(frames[-1].filename).name}, {frames[-1].name}"
