"""Where a base comes from, and whether it can be used: everything that can be said before reading weights."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
)

from data_prep.errors import UserError
from trainer.base.weights import safetensors_files

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.recipe import BaseModelConfig

# Pickles and other formats stay where they are; code only on demand.
FROM_THE_HUB = ["*.json", "*.safetensors", "*.jinja", "*.model", "*.txt"]


def parse_config(base: "BaseModelConfig") -> PretrainedConfig:
    """The model's configuration, from a folder of safetensors that holds an unquantised causal LM.

    Raises:
        UserError: folder missing or no model, pickled or already quantised weights, unknown architecture,
            no causal LM, attention that is missing on this machine.
    """
    folder = resolve_folder(base)
    safetensors_files(folder)
    config = _parse(folder, base.trust_remote_code)
    _refuse_quantised(config, folder)
    _refuse_non_causal(config, base.trust_remote_code)
    _check_attention(base.attention)
    return config


def resolve_folder(base: "BaseModelConfig") -> Path:
    """The local folder of `base.model`, fetched from the Hub where it is an id and not a folder.

    Raises UserError where it is neither, or cannot be fetched.
    """
    folder = Path(base.model).expanduser()
    if folder.is_dir():
        if not (folder / "config.json").is_file():
            raise UserError(f"base.model: {folder} has no config.json; expected the folder of a transformers model")
        return folder
    if folder.is_file():
        raise UserError(f"base.model: {folder} is a file; expected a folder with config.json and *.safetensors")
    if base.model.startswith(("/", ".", "~")) or base.model.count("/") > 1:
        raise UserError(f"base.model: folder {base.model} does not exist; expected a folder or a Hub id")
    return _fetch(base)


def load_tokenizer(base: "BaseModelConfig") -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a pad token: its own, else the end token, else the unknown token.

    The vocabulary stays as it is. A pad equal to the end token is harmless here: labels and documents go by
    position, never by token id.
    """
    folder = resolve_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=base.trust_remote_code)
    except Exception as error:
        raise UserError(
            f"base.model: {folder} has no tokenizer that transformers can read ({one_line(error)}); "
            "expected tokenizer.json beside the weights"
        ) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"base.model: the tokenizer of {folder} has no pad, end or unknown token; give it one")
    return tokenizer


def _fetch(base: "BaseModelConfig") -> Path:
    from huggingface_hub import snapshot_download

    code = ["*.py"] if base.trust_remote_code else []
    try:
        return Path(snapshot_download(base.model, revision=base.revision, allow_patterns=FROM_THE_HUB + code))
    except Exception as error:  # many kinds: no network, no such id, no access, a malformed id
        revision = f" at revision {base.revision}" if base.revision else ""
        raise UserError(
            f"base.model: no folder {base.model} here, and it could not be fetched from the Hub{revision}: "
            f"{type(error).__name__} ({one_line(error)}); "
            "give a local folder, or check the id and the network"
        ) from error


def _parse(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        raw = json.loads((folder / "config.json").read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not readable as JSON ({error})") from error
    if raw.get("auto_map") and not trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"base.model: {folder} brings Python code of its own (model_type {raw.get('model_type')!r}); "
            "set base.trust_remote_code: true if you trust it"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)
    except Exception as error:
        raise UserError(
            f"base.model: {folder} has model_type {raw.get('model_type')!r}, which transformers cannot build "
            f"({one_line(error)}); expected a causal LM that transformers knows"
        ) from error


def _refuse_quantised(config: PretrainedConfig, folder: Path) -> None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return
    fields = found if isinstance(found, dict) else vars(found)
    method = getattr(fields.get("quant_method"), "value", fields.get("quant_method", "unknown"))
    raise UserError(
        f"base.model: {folder} is already quantised ({method}); expected bf16, fp16 or fp32 weights: "
        "take the model it was made from, and base.quantization: nf4 quantises it while loading"
    )


def _refuse_non_causal(config: PretrainedConfig, trust_remote_code: bool) -> None:
    remote = "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING and not (remote and trust_remote_code):
        raise UserError(
            f"base.model: {config.model_type} is no causal language model in transformers; "
            "expected one that predicts the next token, such as llama, qwen3 or gemma2"
        )


def _check_attention(attention: str) -> None:
    if attention != "flash_attention_2":
        return
    if importlib.util.find_spec("flash_attn") is None or not torch.cuda.is_available():
        raise UserError(
            "base.attention: flash_attention_2 needs a CUDA GPU and the package flash-attn; "
            "install it, or set base.attention: sdpa"
        )


def one_line(error: Exception) -> str:
    """The text of an exception on one line, shortened."""
    return " ".join(str(error).split())[:200]
