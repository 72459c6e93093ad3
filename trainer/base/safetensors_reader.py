"""Reads the tensors of a model's safetensors files by ranges, so that none needs to be whole in memory."""

import math
import re
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from data_prep.user_error import UserError
from trainer.base.model_folder import files_of_model
from trainer.base.nf4 import BLOCK

READABLE = ("BF16", "F16", "F32")  # dtypes of weights
# Elements compared at once.
PIECE = 2**20


class Weights:
    """All tensors of a folder's safetensors files, by name. Files are mapped, not read, until asked.

    Raises UserError where the folder has no safetensors, a file is damaged, or two files hold one name.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.bytes_read = 0
        self._slices: dict = {}
        self.files = safetensors_files(folder)
        for path in self.files:
            try:
                file = safe_open(path, framework="pt")
            except (SafetensorError, OSError) as error:
                raise UserError(f"{path}: not a readable safetensors file ({error}); fetch the model again") from error
            for name in file.keys():  # noqa: SIM118 (a safe_open handle does not iterate)
                if name in self._slices:
                    raise UserError(f"{path}: holds {name}, as another file of the folder does; keep one of them")
                self._slices[name] = file.get_slice(name)

    @property
    def names(self) -> list[str]:
        return list(self._slices)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._slices[name].get_shape())

    def numel(self, name: str) -> int:
        return math.prod(self.shape(name))

    def dtype(self, name: str) -> str:
        """The dtype as safetensors writes it: BF16, F16, F32, or one that READABLE does not list."""
        return self._slices[name].get_dtype()

    def nbytes(self, name: str) -> int:
        bits = re.search(r"\d+", self.dtype(name))  # BF16, I64, F8_E4M3, ...; BOOL has none
        return self.numel(name) * (int(bits[0]) if bits else 8) // 8

    def read(self, name: str, start: int, stop: int, piece: int) -> Iterator[Tensor]:
        """The flat elements [start, stop) of a tensor, in order, about `piece` elements (whole blocks) at a time.

        safetensors gives whole rows of the first dimension, so pieces end where rows do, if rows and blocks allow:
        then at most one row more is read at each end. `bytes_read` counts what was asked for.
        """
        tensor, shape = self._slices[name], self.shape(name)
        row = math.prod(shape[1:])
        even = math.lcm(row, BLOCK)
        step = piece // even * even or piece
        low = start
        while low < stop:
            high = min((low // step + 1) * step, stop)
            first, last = low // row, -(-high // row)
            rows = tensor[first:last] if shape else tensor[...]
            self.bytes_read += rows.nbytes
            yield rows.reshape(-1)[low - first * row : high - first * row]
            low = high

    def stored(self, name: str) -> Tensor:
        """The whole tensor as the file holds it, in whatever dtype."""
        return self._slices[name][...]

    def equal(self, one: str, other: str) -> bool:
        """Whether two tensors have the same shape and values."""
        if self.shape(one) != self.shape(other):
            return False
        numel = math.prod(self.shape(one))
        pairs = zip(self.read(one, 0, numel, PIECE), self.read(other, 0, numel, PIECE), strict=True)
        return all(torch.equal(a, b) for a, b in pairs)


def safetensors_files(folder: Path) -> list[Path]:
    """The folder's safetensors files that hold the model, sorted. Raises UserError where there are none."""
    files = files_of_model(folder)
    if files:
        return files
    pickled = [p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in sorted(folder.glob(pattern))]
    if pickled:
        raise UserError(
            f"base.model: {folder} holds pickled weights only ({pickled[0]}), which can run code when read; "
            "expected *.safetensors: save the model once with save_pretrained in a place you trust"
        )
    raise UserError(f"base.model: {folder} holds no *.safetensors; expected the folder of a transformers model")
