"""Puts an adapter from disk on a model, whole or not at all."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel
from torch import nn

from data_prep.errors import UserError


def load_adapter(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """The base under the adapter of a folder, in the dtype of its base layers. options: `PeftModel.from_pretrained`'s.

    Raises UserError where the folder lacks a part of the adapter: PEFT would warn, and go on with a fresh value.
    """
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
        try:
            # read on the CPU: PEFT would take every rank's through the first GPU
            return PeftModel.from_pretrained(
                base, str(folder), autocast_adapter_dtype=False, torch_device="cpu", **options
            )
        except UserWarning as warning:
            told = str(warning)
            raise UserError(
                f"{folder}: parts of the adapter are missing ({told[told.find('[') :][:160]}); give a whole one"
            ) from warning
