"""Where a base comes from, and whether it can be used: everything that can be said before reading weights."""

import importlib.util
import json
from pathlib import Path
from typing import TYPE_CHECKING

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    AutoTokenizer,
    PretrainedConfig,
)

from data_prep.user_error import UserError
from trainer.base.model_folder import one_line, resolve_folder
from trainer.base.safetensors_reader import safetensors_files
from trainer.recipe import TAKE_LENGTHS
from trainer.run.gpu import require_gpu

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from trainer.recipe import BaseModelConfig


def parse_config(base: "BaseModelConfig") -> PretrainedConfig:
    """The model's configuration, from a folder of safetensors that holds an unquantised causal LM.

    Raises:
        UserError: folder missing or no model, pickled or already quantised weights, unknown architecture,
            no causal LM, attention that is missing on this machine.
    """
    folder = resolve_folder(base)
    safetensors_files(folder)
    config = _checked_config(folder, base)
    _check_attention(base.attention, config)
    return config


def parse_config_alone(base: "BaseModelConfig") -> PretrainedConfig:
    """The same from a folder that need hold config.json only; of a Hub id, that alone is fetched."""
    return _checked_config(resolve_folder(base, ["config.json"]), base)


def _checked_config(folder: Path, base: "BaseModelConfig") -> PretrainedConfig:
    config = _parse(folder, base.trust_remote_code)
    _refuse_quantised(config, folder)
    _refuse_non_causal(config, base.trust_remote_code)
    return config


def load_tokenizer(base: "BaseModelConfig", chat_template: Path | None = None) -> "PreTrainedTokenizerBase":
    """The model's tokenizer, with a pad token: its own, else the end token, else the unknown token.

    chat_template: a Jinja file in place of the tokenizer's own (data.chat_template). The vocabulary stays as it is.
    A pad equal to the end token is harmless here: labels and documents go by position, never by token id.
    """
    folder = resolve_folder(base)
    try:
        tokenizer = AutoTokenizer.from_pretrained(  # nosec B615 # a local folder
            folder, trust_remote_code=base.trust_remote_code
        )
    except Exception as error:
        raise UserError(
            f"base.model: {folder} has no tokenizer that transformers can read ({one_line(error)}); "
            "expected tokenizer.json beside the weights"
        ) from error
    if chat_template is not None:
        tokenizer.chat_template = _read_template(chat_template)
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.unk_token
    if tokenizer.pad_token is None:
        raise UserError(f"base.model: the tokenizer of {folder} has no pad, end or unknown token; give it one")
    return tokenizer


def _read_template(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        raise UserError(f"data.chat_template: cannot read {path} ({error}); expected a Jinja file in UTF-8") from error


def _parse(folder: Path, trust_remote_code: bool) -> PretrainedConfig:
    try:
        raw = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError(f"{folder / 'config.json'}: not readable as JSON ({error})") from error
    if raw.get("auto_map") and not trust_remote_code and raw.get("model_type") not in CONFIG_MAPPING:
        raise UserError(
            f"base.model: {folder} brings Python code of its own (model_type {raw.get('model_type')!r}); "
            "set base.trust_remote_code: true if you trust it"
        )
    try:
        return AutoConfig.from_pretrained(folder, trust_remote_code=trust_remote_code)  # nosec B615 # a local folder
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
    if config.get_text_config() is not config:
        raise UserError(
            f"base.model: {config.model_type} holds a language model beside parts for images or sound; "
            "choose a checkpoint of the language model alone, such as gemma3_text"
        )


def _check_attention(attention: str, config: PretrainedConfig) -> None:
    if attention in TAKE_LENGTHS:  # CPUs have no such kernels
        require_gpu("base.attention", attention, "sdpa")
    if attention == "flash_attention_2" and importlib.util.find_spec("flash_attn") is None:
        raise UserError(
            "base.attention=flash_attention_2: needs the package flash-attn, and it is not installed; install it, "
            "or use sdpa"
        )
    if attention == "varlen":
        from trainer.base import varlen_attention  # it imports all of transformers' modeling code

        _check_varlen(config)
        varlen_attention.register()


def _check_varlen(config: PretrainedConfig) -> None:
    """Raises UserError where torch's kernels cannot compute what the model trains with."""
    if dropout := getattr(config, "attention_dropout", 0):
        raise UserError(
            f"base.attention: varlen has no dropout, and {config.model_type} trains with attention_dropout={dropout}; "
            "set base.attention: sdpa"
        )
