"""Writes an adapter in PEFT's format, checked before anyone can see it."""

from collections.abc import Callable
from pathlib import Path

import torch
from peft import PeftModel
from peft.utils import SAFETENSORS_WEIGHTS_NAME
from safetensors.torch import load_file

from data_prep.publish import publish_atomically
from trainer.base.safetensors_writer import translate_disk_errors


def save_adapter(
    model: PeftModel, parameters: dict[str, torch.Tensor], folder: Path, also: Callable[[Path], None] = lambda _: None
) -> None:
    """Publishes `folder` with the adapter's whole parameters, by their names in `model`, under one rename.

    The parameters are passed because under ZeRO-3 the model's own are empty (engine.gather_trainable). What was
    written is read again and compared first. `also` adds files of its own before the rename. Raises RuntimeError
    where what was written differs, OSError where the disk refuses.
    """
    with publish_atomically(folder) as staging:
        with translate_disk_errors(staging):
            model.save_pretrained(str(staging), state_dict=parameters, save_embedding_layers=False)
        written = load_file(staging / SAFETENSORS_WEIGHTS_NAME)
        if len(written) != len(parameters):
            raise RuntimeError(f"{staging}: {len(written)} tensors were written of {len(parameters)}")
        for name, tensor in parameters.items():
            if not torch.equal(written.get(_name_on_disk(name), torch.empty(0)), tensor):
                raise RuntimeError(f"{staging}: {name} was not written as it is")
        also(staging)


def _name_on_disk(name: str) -> str:
    """PEFT leaves the adapter's name out: ...experts.default.lora_a -> ...experts.lora_a."""
    return name.replace(".default.", ".")
