"""Loads exports as other tools do: by plain PEFT, or by transformers alone."""

import copy
from pathlib import Path

import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM

from data_prep.resource_limits import available_memory
from trainer.base.loader import set_generation
from trainer.base.weight_map import DTYPES
from trainer.evaluation.loaded_models import CausalLM, LoadedRun


def load_plain_lora(run: LoadedRun, folder: Path) -> CausalLM:
    """The LoRA of a folder on the run's base. Shares the base's parameters, so they are in memory once."""
    shared = {id(parameter): parameter for parameter in run.model.get_base_model().parameters()}
    base = copy.deepcopy(run.model, shared).unload()
    return PeftModel.from_pretrained(base, str(folder)).eval()


def load_merged(run: LoadedRun, folder: Path) -> CausalLM:
    """The model of a folder, on the run's device, with the run's settings for generation."""
    base = run.recipe.base
    model = AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        folder,
        dtype=DTYPES[base.dtype],
        attn_implementation=base.attention,
        trust_remote_code=base.trust_remote_code,
    )
    set_generation(model, folder)
    return model.to(run.model.device).eval()


def free_bytes(device: torch.device) -> int:
    """Memory available for another model on the device."""
    return torch.cuda.mem_get_info(device)[0] if device.type == "cuda" else available_memory()
