"""Which base an adapter was trained on: a fingerprint, kept beside the adapter and compared where it is loaded."""

import hashlib
import json
import math
import os
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from data_prep.user_error import UserError
from trainer.base.model_folder import files_of_model

BASE_FILE = "base.json"
LONGEST_HEADER = 100_000_000  # bytes; safetensors itself refuses longer ones
SAMPLES = 4  # places in each tensor
SAMPLE = 32  # elements read at each
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")  # keys of config.json


@dataclass(frozen=True)
class _Stored:
    """Where a tensor's bytes [start, stop) lie."""

    file: int  # descriptor
    dtype: str
    shape: list[int]
    start: int
    stop: int


def fingerprint(folder: Path, most: int | None = None) -> str:
    """sha256 over config.json, and every tensor's name, dtype, shape and sampled bytes.

    Does not depend on how the tensors are spread over files, or on where the folder lies. Reads a few kilobytes
    for each tensor, and imports no torch. most: bytes are sampled of so many tensors only, evenly spread over their
    names; with fewer tensors than that it is the same fingerprint.

    Raises OSError or ValueError where the folder cannot be read.
    """
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    kept = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    with ExitStack() as files:
        tensors = _tensors(folder, files)
        every = 1 if most is None else max(1, -(-len(tensors) // most))
        for index, (name, stored) in enumerate(sorted(tensors.items())):
            digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
            if index % every == 0:
                for sample in _samples(stored):
                    digest.update(sample)
    return digest.hexdigest()


def _tensors(folder: Path, files: ExitStack) -> dict[str, _Stored]:
    """By name, from the headers of the folder's safetensors files, which stay open as long as `files`."""
    found: dict[str, _Stored] = {}
    for path in files_of_model(folder):
        file = files.enter_context(path.open("rb"))
        try:
            found |= _header(file)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:  # JSON of any shape
            raise ValueError(f"{path}: not a readable safetensors file ({error}); fetch the model again") from error
    return found


def _header(file: BinaryIO) -> dict[str, _Stored]:
    """The tensors of a file. It begins with its header's length (8 bytes, little endian) and the header, JSON; offsets
    count from its end. Nothing is read by a number that the file cannot hold."""
    size = os.fstat(file.fileno()).st_size
    length = int.from_bytes(file.read(8), "little")
    if length > min(LONGEST_HEADER, size - 8):
        raise ValueError(f"a header of {length} bytes in {size}")
    found: dict[str, _Stored] = {}
    for name, entry in json.loads(file.read(length)).items():
        if name != "__metadata__":
            start, stop = (8 + length + offset for offset in entry["data_offsets"])
            if not 8 + length <= start <= stop <= size:
                raise ValueError(f"{name} lies at {entry['data_offsets']}, outside the file")
            if min(entry["shape"], default=0) < 0 or math.prod(entry["shape"]) > 8 * (stop - start):
                raise ValueError(f"{name} has the shape {entry['shape']} in {stop - start} bytes")
            found[name] = _Stored(file.fileno(), entry["dtype"], entry["shape"], start, stop)
    return found


def _samples(stored: _Stored) -> Iterator[bytes]:
    numel = math.prod(stored.shape)
    if numel:
        width = (stored.stop - stored.start) // numel  # bytes of an element
        for at in sorted({int(start) for start in np.linspace(0, max(numel - SAMPLE, 0), SAMPLES)}):
            size = min(SAMPLE, numel - at) * width
            yield os.pread(stored.file, size, stored.start + at * width)


def write_base_file(folder: Path, model: str, found: str) -> None:
    """Records the base in an adapter's folder: base.json, which plain PEFT leaves alone."""
    (folder / BASE_FILE).write_text(
        json.dumps({"model": model, "fingerprint": found}, indent=2) + "\n", encoding="utf-8"
    )


def check_base_file(folder: Path, model: str, found: str) -> None:
    """Raises UserError where the adapter in `folder` was trained on another base than `model`.

    An adapter of another tool has no base.json, and is taken as it is.
    """
    try:
        trained_on = json.loads((folder / BASE_FILE).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{folder / BASE_FILE}: not readable as JSON ({error}); copy the adapter again") from error
    if not isinstance(trained_on, dict):
        raise UserError(f"{folder / BASE_FILE}: expected an object with model and fingerprint; copy the adapter again")
    if trained_on.get("fingerprint") != found:
        raise UserError(
            f"base.model={model}: the adapter in {folder} was trained on another base, {trained_on.get('model')} "
            f"(fingerprint {str(trained_on.get('fingerprint'))[:12]}, this one {found[:12]}); use that base"
        )
