"""What an export takes from the base besides its weights: tokenizer, configuration and code.

Files are copied, not saved by transformers: version 5 would write them anew in a form that version 4, and servers built
on it, cannot read. Where the base itself was saved so, its JSON is given the older keys too.
"""

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

TEMPLATE_FILES = ("chat_template*", "additional_chat_templates/*.jinja")
TOKENIZER_FILES = (
    *("tokenizer*.json", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt"),
    *("*.model", "*.model.v*", "*.tiktoken", "tekken.json"),
)
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"
ONLY_IN_TRANSFORMERS_5 = "TokenizersBackend"
NAMES = {torch.bfloat16: "bfloat16", torch.float32: "float32"}


def copy_tokenizer(base: Path, folder: Path, tokenizer: PreTrainedTokenizerBase, template: str | None) -> None:
    """Copies the base's tokenizer files as they are.

    tokenizer: as loaded from `base`. template: the recipe's chat template, which then replaces all of the base's. It is
    written to tokenizer_config.json too, since older readers do not know chat_template.jinja.
    """
    _copy(base, folder, (*TOKENIZER_FILES, *tokenizer.vocab_files_names.values()))
    if template is None:
        _copy(base, folder, TEMPLATE_FILES)
    else:
        (folder / CHAT_TEMPLATE).write_text(template, encoding="utf-8")
    path = folder / TOKENIZER_CONFIG
    found = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    config = found if template is None else {**found, "chat_template": template}
    if _needs_transformers_5(config):
        config = _for_transformers_4(config, tokenizer)
    if config != found:
        _write_json(path, config)


def copy_code(base: Path, folder: Path) -> None:
    """The Python files of a base that brings its own model or tokenizer class."""
    _copy(base, folder, ("*.py",))


def write_config(base: Path, folder: Path, dtype: torch.dtype) -> None:
    """config.json with the weights' dtype, and generation_config.json as it is."""
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    names = {"dtype": NAMES[dtype], "torch_dtype": NAMES[dtype]}  # torch_dtype: for transformers 4 and vLLM
    older = {key: value for key, value in _older_rope_keys(config).items() if key not in config}
    _write_json(folder / "config.json", {**config, **older, **names})
    _copy(base, folder, ("generation_config.json",))


def _needs_transformers_5(tokenizer_config: dict[str, Any]) -> bool:
    """Version 4 lacks the class, and expects extra_special_tokens to be a dict."""
    extra = tokenizer_config.get("extra_special_tokens")
    return tokenizer_config.get("tokenizer_class") == ONLY_IN_TRANSFORMERS_5 or isinstance(extra, list)


def _for_transformers_4(config: dict[str, Any], tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The same tokenizer in keys that both versions read, with the defaults that differ between them written out."""
    config = {key: config[key] for key in config.keys() - {"backend", "is_local", "local_files_only"}}
    if config.get("tokenizer_class") == ONLY_IN_TRANSFORMERS_5:
        config["tokenizer_class"] = "PreTrainedTokenizerFast"
    if isinstance(config.get("extra_special_tokens"), list):
        config["additional_special_tokens"] = config.pop("extra_special_tokens")
    config.setdefault("model_input_names", tokenizer.model_input_names)
    config.setdefault("clean_up_tokenization_spaces", tokenizer.clean_up_tokenization_spaces)
    if tokenizer.chat_template is not None:
        config.setdefault("chat_template", _older_templates(tokenizer.chat_template))
    return dict(sorted(config.items()))


def _older_templates(templates: str | dict[str, str]) -> str | list[dict[str, str]]:
    """Chat templates as tokenizer_config.json holds them."""
    if isinstance(templates, str):
        return templates
    return [{"name": name, "template": template} for name, template in templates.items()]


def _older_rope_keys(config: dict[str, Any]) -> dict[str, Any]:
    """The keys of transformers 4 for rope_parameters of version 5; version 4 would take its defaults in silence.

    By layer type (Gemma 3) they are those of the full and of the sliding layers.
    """
    rope = config.get("rope_parameters") or {}
    full, sliding = rope.get("full_attention") or rope, rope.get("sliding_attention") or {}
    older = {key: full[key] for key in ("rope_theta", "partial_rotary_factor") if key in full}
    if "rope_theta" in sliding:
        older["rope_local_base_freq"] = sliding["rope_theta"]
    if full.get("rope_type", "default") != "default":
        rest = {key: value for key, value in full.items() if key not in older.keys() | config.keys() | {"rope_type"}}
        older["rope_scaling"] = {**rest, "type": full["rope_type"]}  # `type` is read by every version 4
    return older


def _copy(base: Path, folder: Path, patterns: tuple[str, ...]) -> None:
    for path in {path for pattern in patterns for path in base.glob(pattern) if path.is_file()}:
        target = folder / path.relative_to(base)
        target.parent.mkdir(exist_ok=True)
        shutil.copyfile(path, target)  # without its mode: a shared base may be read-only


def _write_json(path: Path, content: dict[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
