"""Puts an adapter from disk on a model, whole or not at all."""

import warnings
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors import SafetensorError, safe_open
from torch import nn

from data_prep.user_error import UserError
from trainer.base.model_folder import one_line


def load_adapter(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """The base under the adapter of a folder, in the dtype of its base layers. options: `PeftModel.from_pretrained`'s.

    Raises UserError where the adapter is not one of this base: where it lacks a part, PEFT would warn and go on with a
    fresh value; what has no place in the base it would leave out without a word, or write into the base itself.
    """
    stored = _names_in(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
        try:
            # read on the CPU: PEFT would take every rank's through the first GPU
            model = PeftModel.from_pretrained(
                base, str(folder), autocast_adapter_dtype=False, torch_device="cpu", **options
            )
        except UserWarning as warning:
            told = str(warning)
            raise UserError(
                f"{folder}: parts of the adapter are missing ({told[told.find('[') :][:160]}); give a whole one"
            ) from warning
        except (RuntimeError, ValueError) as error:  # other shapes, or none of the linears
            raise UserError(
                f"{folder}: the adapter does not fit the base ({one_line(error)}); give one that was trained on it"
            ) from error
    if foreign := stored - get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise UserError(
            f"{folder}: {len(foreign)} tensors have no place in an adapter of this base, first {min(foreign)}; give "
            "one that was trained on it, and that trains nothing of the base itself"
        )
    return model


def _names_in(folder: Path) -> set[str]:
    path = folder / SAFETENSORS_WEIGHTS_NAME
    try:
        with safe_open(path, "pt") as file:
            return set(file.keys())
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); give an adapter's folder") from error
