"""Which base an adapter was trained on: a fingerprint, kept beside the adapter and compared where it is loaded."""

import hashlib
import json
import math
from pathlib import Path

import numpy as np
import torch

from data_prep.errors import UserError
from trainer.base.weights import Weights

BASE_FILE = "base.json"
SAMPLES = 4  # places in each tensor
SAMPLE = 32  # elements read at each
NOT_THE_MODEL = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")  # keys of config.json


def fingerprint(weights: Weights) -> str:
    """sha256 over config.json, and every tensor's name, dtype, shape and sampled bytes.

    Does not depend on how the tensors are spread over files, or on where the folder lies. Reads a few kilobytes
    for each tensor.
    """
    config = json.loads((weights.folder / "config.json").read_text())
    kept = {key: value for key, value in config.items() if key not in NOT_THE_MODEL}
    digest = hashlib.sha256(json.dumps(kept, sort_keys=True).encode())
    for name in sorted(weights.names):
        digest.update(json.dumps([name, weights.dtype(name), weights.shape(name)]).encode())
        for sample in _samples(weights, name):
            digest.update(sample)
    return digest.hexdigest()


def _samples(weights: Weights, name: str) -> list[bytes]:
    numel = math.prod(weights.shape(name))
    starts = sorted({int(start) for start in np.linspace(0, max(numel - SAMPLE, 0), SAMPLES)})
    pieces = (piece for at in starts for piece in weights.read(name, at, min(at + SAMPLE, numel), SAMPLE))
    return [piece.contiguous().view(torch.uint8).numpy().tobytes() for piece in pieces]


def write_base_file(folder: Path, model: str, found: str) -> None:
    """Records the base in an adapter's folder: base.json, which plain PEFT leaves alone."""
    (folder / BASE_FILE).write_text(json.dumps({"model": model, "fingerprint": found}, indent=2) + "\n")


def check_base_file(folder: Path, model: str, found: str) -> None:
    """Raises UserError where the adapter in `folder` was trained on another base than `model`.

    An adapter of another tool has no base.json, and is taken as it is.
    """
    try:
        trained_on = json.loads((folder / BASE_FILE).read_text())
    except FileNotFoundError:
        return
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / BASE_FILE}: not readable as JSON ({error}); copy the adapter again") from error
    if trained_on.get("fingerprint") != found:
        raise UserError(
            f"base.model={model}: the adapter in {folder} was trained on another base, {trained_on.get('model')} "
            f"(fingerprint {str(trained_on.get('fingerprint'))[:12]}, this one {found[:12]}); use that base"
        )
