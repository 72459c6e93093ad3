"""An adapter's folder in PEFT's format: read whole or not at all, written and verified before anyone can see it."""

import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME, PeftType
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import nn

from data_prep.publish import publish_atomically
from data_prep.sources.file_kind import refuse_lfs_pointer
from data_prep.user_error import UserError
from trainer.adapters import EXPERT_METHODS
from trainer.base.model_folder import one_line
from trainer.base.safetensors_writer import translate_disk_errors

LARGEST = 1e9  # of an adapter's settings: far beyond it the products of alpha are infinite in fp32
# The keys of a LoRA's adapter_config.json that every reader knows, and that some demand.
COMMON_KEYS = {"peft_type", "task_type", "base_model_name_or_path", "inference_mode", "r", "lora_alpha", "lora_dropout"}
METHODS = ("LORA", *(name.upper() for name in EXPERT_METHODS))  # peft_type of what is read here
COMMON_KEYS |= {"target_modules", "bias", "fan_in_fan_out", "init_lora_weights", "modules_to_save"}


def load_adapter(base: nn.Module, folder: Path, **options: Any) -> PeftModel:
    """The base under a folder's adapter, in the dtype of its base layers. options: for `PeftModel.from_pretrained`.

    Raises UserError where the adapter is not one of this base. PEFT only warns where the adapter lacks a part, and goes
    on with a fresh value; what has no place in the base it leaves out silently, or writes into the base itself.
    """
    stored = _check_tensors(folder)
    read_adapter_config(folder)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*missing adapter keys", UserWarning)
        try:
            # read on the CPU: PEFT would load every rank's adapter through the first GPU
            model = PeftModel.from_pretrained(
                base, str(folder), autocast_adapter_dtype=False, torch_device="cpu", **options
            )
        except UserWarning as warning:
            text = str(warning)
            raise UserError(
                f"{folder}: parts of the adapter are missing ({text[text.find('[') :][:160]}); give a complete one"
            ) from warning
        except Exception as error:  # other shapes, none of the linears; and many kinds for settings of other types
            raise UserError(
                f"{folder}: the adapter does not fit the base ({one_line(error)}); give one that was trained on it"
            ) from error
    if foreign := stored - get_peft_model_state_dict(model, save_embedding_layers=False).keys():
        raise UserError(
            f"{folder}: {len(foreign)} tensors have no place in an adapter of this base, first {min(foreign)}; give "
            "one that was trained on it, and that trains nothing of the base itself"
        )
    return model


def save_adapter(
    model: PeftModel, parameters: dict[str, torch.Tensor], folder: Path, also: Callable[[Path], None] = lambda _: None
) -> None:
    """Publishes `folder` with the adapter's whole parameters, by their names in `model`, under one rename.

    The parameters are passed because under ZeRO-3 the model's own are empty (engine.gather_trainable). `also` adds
    files of its own before the rename. Raises RuntimeError where what is read back differs, OSError where the disk
    refuses.
    """
    with publish_atomically(folder) as staging:
        with translate_disk_errors(staging):
            model.save_pretrained(str(staging), state_dict=parameters, save_embedding_layers=False)
            drop_default_keys(staging)
        written = load_file(staging / SAFETENSORS_WEIGHTS_NAME)
        if len(written) != len(parameters):
            raise RuntimeError(f"{staging}: {len(written)} tensors were written of {len(parameters)}")
        for name, tensor in parameters.items():
            if not torch.equal(written.get(_name_on_disk(name), torch.empty(0)), tensor):
                raise RuntimeError(f"{staging}: {name} was not written as it is")
        also(staging)


def drop_default_keys(folder: Path) -> None:
    """Leaves in a plain LoRA's adapter_config.json the common keys, and those that differ from PEFT's defaults.

    PEFT writes all it knows, most of it null, and older PEFT refuses keys that it does not know. Configurations of our
    own methods are read by this package only and stay as they are.
    """
    path = folder / CONFIG_NAME
    config = json.loads(path.read_text(encoding="utf-8"))
    if config["peft_type"] != PeftType.LORA:
        return
    defaults = LoraConfig().to_dict()
    kept = {key: value for key, value in config.items() if key in COMMON_KEYS or _says_something(value, defaults, key)}
    kept.pop("peft_version", None)  # who wrote it, not what it needs
    if isinstance(kept.get("target_modules"), list):
        kept["target_modules"].sort()  # PEFT keeps a set, in another order each time
    path.write_text(json.dumps(kept, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _says_something(value: Any, defaults: dict[str, Any], key: str) -> bool:
    return value not in (None, [], {}, defaults.get(key))


def read_adapter_config(folder: Path) -> Any:  # as PEFT types it: each method has fields of its own
    """PEFT's configuration in an adapter's folder. Raises UserError where there is none that can be computed with."""
    try:
        if not (folder / CONFIG_NAME).is_file():  # PEFT would take a/b for an id of the Hub
            raise ValueError(f"it has no {CONFIG_NAME}")
        config = PeftConfig.from_pretrained(str(folder))
        if config.peft_type not in METHODS:  # others fetch further adapters, or read pickles, that theirs names
            kind = str(config.peft_type).removeprefix("PeftType.")
            raise ValueError(f"a {kind} is none of {', '.join(METHODS)}")
        numbers = {key: value for key, value in config.to_dict().items() if isinstance(value, float)}
        if strange := [f"{key}={value}" for key, value in numbers.items() if not abs(value) <= LARGEST]:
            raise ValueError(f"{strange[0]} cannot be computed with")
    except Exception as error:  # PEFT raises many kinds for a folder without an adapter, and for other types
        raise UserError(
            f"{folder} holds no adapter that PEFT can read ({one_line(error)}); give the adapter/ folder of a run"
        ) from error
    return config


def _check_tensors(folder: Path) -> set[str]:
    """Names of the adapter's tensors. Raises UserError where the file cannot be read, or holds NaN or infinity."""
    path = folder / SAFETENSORS_WEIGHTS_NAME
    refuse_lfs_pointer(path, "adapter")
    try:
        with safe_open(path, "pt") as file:
            names = set(file.keys())
            broken = [name for name in sorted(names) if not torch.isfinite(file.get_tensor(name)).all()]
    except (OSError, SafetensorError) as error:
        raise UserError(f"{path}: not a readable safetensors file ({error}); give an adapter's folder") from error
    if broken:
        raise UserError(
            f"{path}: {len(broken)} of {len(names)} tensors are not finite, first {broken[0]}; give the adapter of a "
            "run that did not diverge"
        )
    return names


def _name_on_disk(name: str) -> str:
    """PEFT leaves the adapter's name out: ...experts.default.lora_a -> ...experts.lora_a."""
    return name.replace(".default.", ".")
