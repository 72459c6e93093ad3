"""The processor that numbers were measured on."""

from pathlib import Path


def processor() -> str:
    """Its name as the kernel has it."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
