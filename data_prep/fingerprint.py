"""What a prepared set was made from, as hashes: sources, tokenizer, chat template, code."""

import hashlib
import json
from importlib.metadata import version
from pathlib import Path
from typing import Any

from data_prep.chat import check_tokenizer
from data_prep.config import DataConfig, JsonlSource
from data_prep.errors import UserError

_DECISIVE_LIBRARIES = ("reasoning-gym", "tokenizers", "transformers")  # generate, tokenise, render


def config_as_compared(config: DataConfig) -> dict[str, Any]:
    """The section as JSON values, without the folder: a prepared set may be moved."""
    return config.model_dump(mode="json", exclude={"prepared_dir"})


def tokenizer_hashes(tokenizer: Any) -> dict[str, str]:
    """sha256 of the tokenizer and of its chat template.

    Covers vocabulary, merges, normalisation, added and special tokens. Leaves out what cannot change a prepared
    set and what callers like to change: the pad token, and the padding and truncation last asked for.
    Raises UserError where the tokenizer has no chat template or is not a fast one.
    """
    check_tokenizer(tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    lasting = backend[backend.index('"added_tokens"') :]  # `version`, `truncation` and `padding` stand before it
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return {
        "sha256": _sha256(lasting + json.dumps(special, sort_keys=True)),
        "chat_template_sha256": _sha256(tokenizer.get_chat_template()),
    }


def source_states(config: DataConfig, remembered: dict[str, Any] | None = None) -> dict[str, Any]:
    """Size, modification time and sha256 of every source file, by the source's key in the recipe.

    A file whose size (bytes) and modification time (ns) equal the `remembered` ones is not read again.
    Raises UserError where a file cannot be read.
    """
    files = {f"data.sources.{i}.path": s.path for i, s in enumerate(config.sources) if isinstance(s, JsonlSource)}
    return {key: file_state(path, key, (remembered or {}).get(key)) for key, path in files.items()}


def file_state(path: Path, key: str, remembered: dict[str, Any] | None) -> dict[str, Any]:
    """Path, size, modification time and sha256 of one file; see source_states."""
    try:
        stat = path.stat()
        state = {"path": str(path), "bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}
        if remembered and all(remembered.get(name) == value for name, value in state.items()):
            return remembered
        with path.open("rb") as file:
            digest = hashlib.sha256()
            while chunk := file.read(1 << 20):
                digest.update(chunk)
        return {**state, "sha256": digest.hexdigest()}
    except OSError as error:
        raise UserError(
            f"{key}: cannot read {path} ({error.strerror}); expected a readable JSONL file, give its path"
        ) from error


def preparation_key(config: DataConfig, sources: dict[str, Any], tokenizer: dict[str, str]) -> str:
    """sha256 of everything that decides a prepared set's content; equal keys, equal bytes."""
    decisive = {
        "config": config_as_compared(config),
        "sources": {key: state["sha256"] for key, state in sources.items()},
        "tokenizer": tokenizer,
        "code": _code_hash(),
        "libraries": {name: version(name) for name in _DECISIVE_LIBRARIES},
    }
    return _sha256(json.dumps(decisive, sort_keys=True))


def _code_hash() -> str:
    """Hash of this package's own text, so that a change of the code is never forgotten."""
    digest = hashlib.sha256()
    for path in sorted(Path(__file__).parent.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
