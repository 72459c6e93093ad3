"""This machine's NVIDIA GPUs: which are visible, whether torch can use them, and what their errors mean to users.

Imports no torch, which takes seconds: `teamlora check` and the launcher ask here too.
"""

import itertools
import os
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.user_error import UserError

if TYPE_CHECKING:
    import torch

# Variables of torch's allocator; the first that is set counts.
ALLOCATOR_SETTINGS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
# Rows differ in length, so freed blocks fit no later request: segments that grow leave no such gaps. Pinned host memory
# is rounded up to a power of two (ATen/core/CachingHostAllocator.h of torch 2.13), up to twice the size: only below 1
# MiB then.
ALLOCATOR_DEFAULT = "expandable_segments:True,pinned_max_round_threshold_mb:1"


class RankWithoutGpu(UserError):
    """More ranks were started on a machine than it has GPUs; those that have one do not notice."""


def visible_gpus() -> list[int | str] | None:
    """Ids in CUDA_VISIBLE_DEVICES up to the first -1 or empty one, as CUDA reads it; None if it is not set.

    Slurm sets it to NoDevFiles for a job without GPUs.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is None:
        return None
    names = itertools.takewhile(lambda name: name not in ("-1", "", "NoDevFiles"), map(str.strip, visible.split(",")))
    return [int(name) if name.isdecimal() else name for name in names]


def gpu_files() -> list[Path]:
    """The driver's files of GPUs: one per GPU that this machine, or this container, has."""
    return sorted(Path("/dev").glob("nvidia[0-9]*"))


def configure_allocator() -> None:
    """Sets torch's CUDA allocator for rows of different lengths, unless the user has. Call it before CUDA starts."""
    if not any(name in os.environ for name in ALLOCATOR_SETTINGS):
        os.environ[ALLOCATOR_SETTINGS[0]] = ALLOCATOR_DEFAULT


def compute_device() -> "torch.device":
    """The GPU that is current, else the CPU. Raises UserError as `gpus_are_usable` does."""
    import torch

    return torch.device("cuda" if gpus_are_usable() else "cpu")


def gpus_are_usable() -> bool:
    """Whether torch can use a GPU; False where none is visible.

    Raises UserError where one is visible and torch cannot use it: a run would go to the CPU without a word.

    torch says "not available" where the driver is older than its CUDA build needs (torch.cuda.is_available never
    raises), while NVML still counts the GPUs (torch.cuda.device_count). A CPU build counts none.
    """
    import torch

    if torch.cuda.is_available():
        return True
    if visible_gpus() != [] and (torch.cuda.device_count() or gpu_files()):
        raise UserError(
            f"torch {torch.__version__} cannot use this machine's GPU ({_reason()}); update the driver or install "
            "another build of torch, see docs/gpu.md; to run on the CPU, set CUDA_VISIBLE_DEVICES to nothing"
        )
    return False


def require_gpu(key: str, value: str, other: str) -> None:
    """Raises UserError for a value that needs a GPU where there is none. other: a value that does not."""
    if not gpus_are_usable():
        raise UserError(f"{key}={value}: needs a GPU, and this machine has none; use {other}")


def take_gpu(local_rank: int) -> "torch.device":
    """Makes GPU `local_rank` of this machine the current one. Raises RankWithoutGpu where there are fewer."""
    import torch

    count = torch.cuda.device_count()
    if local_rank >= count:
        visible = os.environ.get("CUDA_VISIBLE_DEVICES", "not set")
        raise RankWithoutGpu(
            f"LOCAL_RANK={local_rank}: this rank sees {count} GPU{'s' if count != 1 else ''} "
            f"(CUDA_VISIBLE_DEVICES: {visible}); start at most one rank per GPU (num_gpus={count}, slots={count} in a "
            "hostfile, or your launcher's number of processes per node)"
        )
    torch.cuda.set_device(local_rank)
    return torch.device("cuda", local_rank)


def out_of_memory(error: BaseException) -> str | None:
    """One line for users where the GPU's memory was exhausted, else None.

    torch raises torch.OutOfMemoryError; bitsandbytes and NCCL raise others, whose texts have CUDA's words.
    """
    text = " ".join(str(error).split())
    if type(error).__name__ != "OutOfMemoryError" and "out of memory" not in text.lower():
        return None
    found = text.partition(" Process ")[0].partition(" Including non-PyTorch ")[0][:250]
    return (
        f"the GPU's memory is exhausted ({found}); lower train.micro_batch_size (--batch-size in evaluation) or "
        "data.seq_len, set train.activation_checkpointing=true or offload, and ask `teamlora estimate` what fits"
    )


def _reason() -> str:
    """Why CUDA does not start, in torch's words."""
    import torch

    try:
        torch.cuda.init()
    except (RuntimeError, AssertionError) as error:
        return " ".join(str(error).split()).partition(". ")[0][:200]
    return "no reason given"
