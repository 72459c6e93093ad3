"""The ranks of a launch: how they meet, agree on a mistake, and notice that one of them is gone."""

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
from trainer.distributed.network import interface_to
from trainer.errors import LostRank, Stopped, TrainingFault

# What a launcher sets, for a run without one: a group of one rank on any free port.
ALONE = {"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}

# In the text of an error of gloo's or NCCL's about a connection, for which torch has no type.
LOST = ("gloo", "connection closed by peer", "connection reset by peer", "nccl", "timed out waiting", "pair closure")

# NCCL's names for what is wrong with this rank's machine or set-up, unless it is about a peer.
NOT_THE_OTHERS = ("ncclInvalidUsage", "ncclUnhandledCudaError", "ncclInternalError", "ncclSystemError")


@contextlib.contextmanager
def process_group(timeout: timedelta | None = None) -> Iterator[torch.device]:
    """Joins the ranks that the launcher started (or makes a group of one) and gives this rank's device.

    timeout: how long ranks wait for one another, to meet and in each collective; None: torch's half hour. Raises
    LostRank where they do not meet, TrainingFault where the port at which they would is taken.

    Left in good order also after an error that every rank raises: with its threads alive a process would abort. NCCL's
    goodbye waits for all ranks, so after an error of this one alone it is left out there: the others must hear of it.
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
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        if "EADDRINUSE" in text:
            raise TrainingFault(  # no mistake: the next start of a supervised launch takes another
                f"the ranks cannot meet at {place}: the port is taken, perhaps by a rank that an earlier launch left "
                "behind; start again, or where the launcher was given the port give it another (--master_port N)"
            ) from None
        if not isinstance(error, dist.DistError) and "gloo" not in text.lower():
            raise
        limit = f" within run.start_timeout={timeout.total_seconds():g} s" if timeout is not None else ""
        raise LostRank(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} on {socket.gethostname()}: the ranks did not "
            f"meet at {place}{limit} ({text[:200]}); a node did not come, or none reaches that address and port"
        ) from error


def _start_process_group(timeout: timedelta | None = None) -> torch.device:
    """Joins the ranks that the environment tells of and returns this rank's device."""
    import deepspeed

    # On a CPU DeepSpeed would compile this op at first use (half a minute); it serves tensor-parallel inference only.
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    if (interface := interface_to(os.environ["MASTER_ADDR"])) not in (None, "lo"):
        # left to itself gloo takes the address of the host's own name, which Debian makes 127.0.1.1
        os.environ.setdefault("GLOO_SOCKET_IFNAME", interface)
    on_gpu = torch.cuda.is_available()
    if on_gpu:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    limit = {"timeout": timeout} if timeout is not None else {}
    deepspeed.init_distributed(dist_backend="nccl" if on_gpu else "gloo", verbose=False, **limit)
    return torch.device("cuda", torch.cuda.current_device()) if on_gpu else torch.device("cpu")


def set_collective_timeout(timeout: timedelta) -> None:
    """From now on collectives of all process groups wait so long for a rank that does not answer."""
    for group in list(dist.distributed_c10d._world.pg_map):
        dist.distributed_c10d._set_pg_timeout(timeout, group)


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Runs a block in which any rank may meet a person's mistake; then every rank raises the first rank's.

    After any other error of one rank the others raise a TrainingFault that names it. Every rank takes part in one small
    exchange at the end. The block itself must hold no collective: a rank that left it early would keep the others
    waiting.
    """
    mistake, fault = None, None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    except Exception as error:
        fault = error
    found: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(found, (mistake, fault and f"{type(fault).__name__}: {fault}"))
    for text, _ in found:
        if text is not None:
            raise UserError(text)
    if fault is not None:
        raise fault
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise TrainingFault(f"rank {rank} ended with {' '.join(text.split())[:200]}")


@contextlib.contextmanager
def translate_peer_errors(doing: str) -> Iterator[None]:
    """Turns what torch.distributed raises where another rank has gone, or is stuck, into a LostRank."""
    try:
        yield
    except TrainingFault:
        raise
    except RuntimeError as error:
        text = _reason(error)
        if not isinstance(error, dist.DistError) and not any(word in text.lower() for word in LOST):
            raise
        if any(word in text for word in NOT_THE_OTHERS) and "peer" not in text:
            raise TrainingFault(f"{doing}, rank {os.environ['RANK']}: {text[:300]}") from error
        raise LostRank(
            f"{doing}, rank {os.environ['RANK']}: another rank has ended or does not answer in {_operation(error)} "
            f"({text[:200]}); what it says itself is the cause; if it says nothing, it was killed (out of memory?)"
        ) from error


def _reason(error: BaseException) -> str:
    """On one line; NCCL's begins with where in torch's source it struck, and ends with the cause."""
    text = " ".join(str(error).split())
    place, last, cause = text.partition("Last error:")
    kind = next((word for word in NOT_THE_OTHERS if word in place), "NCCL error")
    return f"{kind}: {cause.strip()}" if last and cause.strip() else text


def _operation(error: BaseException) -> str:
    """The call into torch.distributed that raised it, as the traceback names it."""
    frames = traceback.extract_tb(error.__traceback__)
    calls = [frame.name for frame in frames if Path(frame.filename).name == "distributed_c10d.py"]
    if calls:
        return calls[-1]
    return f"line {frames[-1].lineno} of {Path(frames[-1].filename).name}, {frames[-1].name}"
