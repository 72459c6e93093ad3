"""Safetensors files on disks that may refuse them."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor


@contextmanager
def translate_disk_errors(path: Path) -> Iterator[None]:
    """Turns safetensors' own error for a disk that refuses into an OSError about `path`."""
    try:
        yield
    except SafetensorError as error:
        raise OSError(None, str(error), str(path)) from error


def write_tensors(tensors: dict[str, Tensor], path: Path) -> None:
    """One file, as transformers and PEFT read it. Raises OSError where the disk refuses."""
    with translate_disk_errors(path):
        save_file(tensors, path, metadata={"format": "pt"})
