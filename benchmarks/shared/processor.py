"""The processor and the device that numbers were measured on."""

from pathlib import Path

import torch

from trainer.run.gpu import compute_device


def processor() -> str:
    """Its name as the kernel has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def device_name() -> str:
    """The GPU's name, or cpu."""
    return torch.cuda.get_device_name() if compute_device().type == "cuda" else "cpu"
