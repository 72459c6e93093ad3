"""What makes a run repeatable: random numbers that depend on seed, step and rank alone, and deterministic kernels."""

import os

import numpy as np
import torch
import torch.distributed as dist


def seed_step(seed: int, step: int) -> None:
    """Seeds dropout of one step as a function of (seed, step, rank), so that no generator's state has to be saved."""
    (value,) = np.random.SeedSequence([seed, step, dist.get_rank()]).generate_state(1, np.uint64)
    torch.manual_seed(int(value))


def use_deterministic_kernels() -> None:
    """Refuses operations whose reruns may differ in their last bits. Call it before anything runs on a GPU."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as torch's notes on reproducibility ask
    os.environ.setdefault("FLASH_ATTENTION_DETERMINISTIC", "1")  # flash-attn's own switch
    torch.use_deterministic_algorithms(True)
    # torch gives the module this attribute at run time
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
