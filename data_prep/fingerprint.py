"""Hashes of what a prepared set was made from: sources, tokenizer, chat template, code."""

import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from data_prep.chat import check_offsets
from data_prep.config import DataConfig, FilesSource, HubSource, ReasoningGymSource
from data_prep.sources.columns import hub_revision
from data_prep.sources.finding import find_files, refuse_other_kind, unreadable_file
from data_prep.sources.read import source_key
from data_prep.suite.tasks import packages_of
from data_prep.template_renderer import generation_stops
from data_prep.user_error import UserError

SourceState = dict[str, Any]
PACKAGE = Path(__file__).parent

_DECISIVE_LIBRARIES = ("tokenizers", "transformers", "jinja2", "pyarrow")
_TOKENIZER_FILES = (
    "*token*", "*.jinja", "additional_chat_templates/*", "*.model", "vocab*", "merges*", "config.json",
    "chat_template.json", "generation_config.json",
)  # fmt: skip


def comparable_config(config: DataConfig) -> dict[str, Any]:
    """The data section as JSON values, without the folder, since a prepared set may be moved."""
    return config.model_dump(mode="json", exclude={"prepared_dir"})


def tokenizer_hashes(tokenizer: Any) -> dict[str, str]:
    """sha256 of the tokenizer and of its chat template.

    Covers vocabulary, merges, normalization, added and special tokens. Leaves out what callers often change and what
    cannot change a prepared set: the pad token, and the current padding and truncation settings.
    Raises UserError if the tokenizer is not a fast one.
    """
    check_offsets(tokenizer)
    backend = tokenizer.backend_tokenizer.to_str()
    lasting = backend[backend.index('"added_tokens"') :]  # `version`, `truncation` and `padding` come before it
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items() if name != "pad_token"}
    return {
        "sha256": _sha256(lasting + json.dumps(special, sort_keys=True)),
        # a dictionary if the tokenizer has several templates, such as one for tools
        "chat_template_sha256": _sha256(json.dumps(tokenizer.chat_template or "", sort_keys=True)),
    }


def tokenizer_state(tokenizer: Any) -> dict[str, Any]:
    """What decides a prepared set of a tokenizer and what is beside it: its hashes, and where generation stops."""
    return {**tokenizer_hashes(tokenizer), "stops": sorted(generation_stops(tokenizer))}


def source_states(config: DataConfig, remembered: Sequence[SourceState] = ()) -> list[SourceState]:
    """The state of every source: path, size, modification time and sha256 of files, the commit of Hub datasets.

    A file whose size (bytes) and modification time (ns) equal the remembered ones is not read again. All others are
    looked at before any is read as a whole.
    Raises UserError if a file cannot be read or is not what its name says, or if the Hub cannot be reached.
    """
    files = {
        index: _checked_files(source, source_key(index), config.prepared_dir, remembered)
        for index, source in enumerate(config.sources)
        if isinstance(source, FilesSource)
    }
    states: list[SourceState] = []
    for index, source in enumerate(config.sources):
        key = source_key(index)
        if index in files:
            states += file_states(files[index], f"{key}.path", remembered)
        elif isinstance(source, HubSource):
            states.append({"key": f"{key}.name", "path": source.name, "sha256": hub_revision(source, key)})
    return states


def _checked_files(source: FilesSource, key: str, prepared_dir: Path, remembered: Sequence[SourceState]) -> list[Path]:
    """The source's files. Raises UserError for those that are this set's own, or not what their names say."""
    files = find_files(source, key)[0]
    _refuse_own_output(source, files, prepared_dir, key)
    known = {state["path"]: state for state in remembered}
    for path in files:
        if not _is_unchanged(path, known.get(str(path), {})):
            refuse_other_kind(path, source, key)
    return files


def _refuse_own_output(source: FilesSource, files: Iterable[Path], prepared_dir: Path, key: str) -> None:
    own = prepared_dir.resolve()
    inside = source.path.is_dir() and own.is_relative_to(source.path.resolve())
    if inside or any(path.resolve().is_relative_to(own) for path in files):
        raise UserError(
            f"{key}.path: {source.path} includes data.prepared_dir={prepared_dir}; give data.prepared_dir a folder "
            "outside of the sources"
        )


def file_states(paths: Iterable[Path], key: str, remembered: Sequence[SourceState] = ()) -> list[SourceState]:
    """Key, path, size, modification time and sha256 of files; see source_states."""
    known = {state["path"]: state for state in remembered}
    return [_file_state(path, key, known.get(str(path), {})) for path in paths]


def same_content(states: Sequence[SourceState], others: Sequence[SourceState]) -> bool:
    """Whether these are the same files with the same content, whatever their times."""
    contents = ([(state["path"], state["sha256"]) for state in each] for each in (states, others))
    return next(contents) == next(contents)


def _file_state(path: Path, key: str, remembered: SourceState) -> SourceState:
    try:
        state = {"key": key, "path": str(path), **_size_and_time(path)}
        if _is_unchanged(path, remembered):
            return {**state, "sha256": remembered["sha256"]}
        with path.open("rb") as file:
            return {**state, "sha256": hashlib.file_digest(file, "sha256").hexdigest()}
    except OSError as error:
        raise unreadable_file(path, error, key.removesuffix(".path")) from error


def _is_unchanged(path: Path, remembered: SourceState) -> bool:
    return bool(remembered) and os.path.exists(path) and _size_and_time(path).items() <= remembered.items()


def _size_and_time(path: Path) -> dict[str, int]:
    stat = path.stat()
    return {"bytes": stat.st_size, "mtime_ns": stat.st_mtime_ns}


def tokenizer_files(folder: Path, config: DataConfig) -> list[Path]:
    """The files that a tokenizer is loaded from, and the recipe's own chat template, if it exists."""
    found = {path for pattern in _TOKENIZER_FILES for path in folder.glob(pattern)}
    own = config.chat_template
    return sorted(found) + ([own] if own and own.is_file() else [])


def preparation_key(config: DataConfig, sources: Sequence[SourceState], tokenizer: dict[str, Any]) -> str:
    """sha256 of everything that decides a prepared set's content: equal keys mean equal bytes.

    tokenizer: its state.
    """
    decisive = {
        "config": comparable_config(config),
        "sources": [(state["key"], state["path"], state["sha256"]) for state in sources],
        "tokenizer": tokenizer,
        "code": code_hash(),
        "libraries": library_versions(config),
    }
    return _sha256(json.dumps(decisive, sort_keys=True))


def library_versions(config: DataConfig) -> dict[str, str]:
    """Versions of the libraries that generate, read, clean, tokenize and render.

    Raises UserError if reasoning-gym is needed and not installed.
    """
    gym = ["reasoning-gym"] if any(isinstance(source, ReasoningGymSource) for source in config.sources) else []
    near = ["datasketch", "regex"] if config.cleaning.near_duplicates is not None else []
    try:
        return {name: version(name) for name in [*gym, *_DECISIVE_LIBRARIES, *near, *packages_of(config)]}
    except PackageNotFoundError as error:
        raise UserError(
            f"data.sources: reasoning_gym needs the package {error.name}, which is not installed; run "
            "`pip install 'teamlora[sample]'`"
        ) from error


def code_hash(package: Path = PACKAGE) -> str:
    """sha256 of a package's source files, so that any change of the code is noticed."""
    digest = hashlib.sha256()
    for path in sorted(package.rglob("*.py")):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()
