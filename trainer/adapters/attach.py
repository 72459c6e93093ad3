"""Builds the PEFT model that a recipe's adapter section describes, fresh or from an adapter on disk."""

from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import torch
from accelerate import init_empty_weights
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from torch import nn
from transformers import PreTrainedModel

from data_prep.user_error import UserError
from trainer.adapters import EXPERT_METHODS
from trainer.adapters.adapter_folder import load_adapter, read_adapter_config
from trainer.recipe import AdapterConfig

TASK_TYPE = "CAUSAL_LM"
# Settings in which an adapter to start from may differ: its origin, its initialization, and what the recipe replaces.
MAY_DIFFER = {"base_model_name_or_path", "revision", "peft_version", "task_type", "inference_mode", "auto_mapping"}
MAY_DIFFER |= {"init_lora_weights", "target_modules", "dropout", "lora_dropout", "balance_loss_weight"}
MAY_DIFFER |= {"num_router_outputs"}  # written by `teamlora experts --add`


def peft_config(adapter: AdapterConfig) -> PeftConfig:
    """PEFT's configuration of the adapter that the recipe describes."""
    targets = list(adapter.target_modules)
    if adapter.method == "lora":
        return LoraConfig(
            r=adapter.total_rank,
            lora_alpha=cast(int, adapter.alpha),  # PEFT takes any number
            lora_dropout=adapter.dropout,
            target_modules=targets,
            task_type=TASK_TYPE,
        )
    config, _ = EXPERT_METHODS[adapter.method]
    shared = {field.name for field in fields(config)} & AdapterConfig.model_fields.keys()
    settings = {name: getattr(adapter, name) for name in shared}
    return config(**settings | {"target_modules": targets, "task_type": TASK_TYPE})


def check_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> None:
    """Raises UserError where the adapter does not fit the model, which may be on meta."""
    head = model.get_output_embeddings()
    linears = {name for name, m in model.named_modules() if isinstance(m, nn.Linear) and m is not head}
    for target in adapter.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in linears):
            existing = sorted({name.rpartition(".")[2] for name in linears})
            raise UserError(
                f"adapter.target_modules: {target!r} matches no linear layer of {model.config.model_type}; "
                f"it has {', '.join(existing)}"
            )
    if adapter.init_from is not None:
        _check_init_from(adapter.init_from, adapter)


def attach_adapter(model: PreTrainedModel, adapter: AdapterConfig) -> PeftModel:
    """Puts the adapter into the model, in the dtype of its base layers; only the adapter is trainable then.

    Fresh values come from torch's global generator: use the same seed on every rank. Raises UserError where the adapter
    to start from lacks a part.
    """
    if adapter.init_from is None:
        return get_peft_model(model, peft_config(adapter), autocast_adapter_dtype=False)
    return load_adapter(model, adapter.init_from, is_trainable=True, config=_continued(adapter))


def attach_on_meta(model: PreTrainedModel, adapter: AdapterConfig, dtype: torch.dtype) -> PeftModel:
    """The same modules around a model on meta. Their parameters are on meta too, in `dtype`, the compute dtype.

    PEFT does not cast adapters on meta, so this function does.
    """
    config = peft_config(adapter) if adapter.init_from is None else _continued(adapter)
    config.inference_mode = False  # an adapter on disk is marked as finished
    with init_empty_weights(include_buffers=False):
        adapted = get_peft_model(model, config, autocast_adapter_dtype=False)
    for parameter in adapted.parameters():
        if parameter.requires_grad:
            parameter.data = parameter.data.to(dtype)
    return adapted


def _continued(adapter: AdapterConfig) -> PeftConfig:
    """The configuration of the adapter on disk, with the recipe's settings for training."""
    found, wanted = PeftConfig.from_pretrained(str(adapter.init_from)), peft_config(adapter)
    for setting in ("dropout", "lora_dropout", "balance_loss_weight"):
        if hasattr(wanted, setting):
            setattr(found, setting, getattr(wanted, setting))
    return found


def _check_init_from(folder: Path, adapter: AdapterConfig) -> None:
    """An adapter to start from must compute what the recipe describes."""
    try:
        found = read_adapter_config(folder)
    except UserError as error:
        raise UserError(f"adapter.init_from: {error}") from error
    wanted = peft_config(adapter)
    if found.peft_type != wanted.peft_type:
        raise UserError(
            f"adapter.init_from: {folder} holds a {found.peft_type.value} adapter, but adapter.method="
            f"{adapter.method}; make them agree"
        )
    for theirs, ours in _shared_settings(adapter.method).items():
        if getattr(found, theirs) != getattr(adapter, ours):
            raise UserError(
                f"adapter.init_from: {folder} has {ours}={getattr(found, theirs)}, but adapter.{ours}="
                f"{getattr(adapter, ours)}; make them agree"
            )
    theirs = found.target_modules
    named = isinstance(theirs, (list, set))  # else a pattern
    if not named or set(theirs) != set(adapter.target_modules):
        adapted = ", ".join(sorted(theirs)) if named else repr(theirs)
        raise UserError(
            f"adapter.init_from: {folder} adapts {adapted}, but adapter.target_modules="
            f"{', '.join(adapter.target_modules)}; make them agree"
        )
    _refuse_other_settings(folder, found.to_dict(), wanted.to_dict())


def _refuse_other_settings(folder: Path, found: dict[str, Any], wanted: dict[str, Any]) -> None:
    """Refuses PEFT settings that change what is computed or trained: DoRA, modules_to_save, rank_pattern and others."""
    for key in found.keys() - MAY_DIFFER:
        if found[key] != wanted.get(key):
            raise UserError(
                f"adapter.init_from: {folder} has {key}={found[key]!r}, which no recipe describes; merge that adapter "
                "into its base, and train on the merged model"
            )


def _shared_settings(method: str) -> dict[str, str]:
    """Settings that decide what an adapter computes: {name in PEFT's configuration: name in the recipe}."""
    if method == "lora":
        return {"r": "total_rank", "lora_alpha": "alpha"}
    names = ("num_experts", "expert_rank", "alpha", *(("renormalize",) if method == "teamlora" else ()))
    return {name: name for name in names}
