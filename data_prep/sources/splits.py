"""Splits named by files and folders, such as train.jsonl beside test.jsonl, or train/ beside test/."""

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from data_prep.user_error import UserError

_SPLITS = {  # a word in a name, and the split
    "train": "train", "training": "train", "trn": "train", "valid": "validation", "val": "validation",
    "validation": "validation", "dev": "validation", "test": "test", "testing": "test", "tst": "test", "eval": "eval",
    "evaluation": "eval", "heldout": "heldout", "holdout": "heldout",
}  # fmt: skip
_NAMES = frozenset(_SPLITS.values())
_WORD = re.compile(r"h[eo]ld[-_ ]?out|[a-z]+|\d+")
_WITHIN_WORD = re.compile("|".join(sorted(_SPLITS, key=len, reverse=True)))


@dataclass(frozen=True)
class _Mark:
    """The split that a file's name or folder names."""

    split: str
    path: Path  # that stands for the split: a folder or a pattern
    alone: bool  # whether the split is all that the name says: test-00000-of-00002.parquet


def refuse_several_splits(files: Sequence[Path], folder: Path, key: str) -> None:
    """Raises UserError if these files below `folder` are named after several splits.

    A file of no split beside test.jsonl is one more split: the data without its test set.
    """
    first: dict[str | None, tuple[Path, _Mark | None]] = {}
    for path in files:
        mark = _mark(path, folder)
        known = first.setdefault(mark.split if mark else None, (path, mark))[1]
        if mark and mark.alone and known and not known.alone:
            first[mark.split] = (path, mark)
    marks = [mark for _, mark in first.values() if mark]
    is_rest_a_split = None in first and any(mark.alone and mark.split != "train" for mark in marks)
    if len(marks) < (1 if is_rest_a_split else 2):
        first = {mark.split: (path, mark) for path, mark in _twins(files, folder).items()}
        marks, is_rest_a_split = [mark for _, mark in first.values() if mark], False
    if not marks:
        return
    named = ", ".join(str(path.relative_to(folder)) for path, _ in first.values())
    chosen = next((mark for mark in marks if mark.split == "train"), marks[0])
    advice = f"set {key}.split: {chosen.split}, or path: {chosen.path}"
    if is_rest_a_split and chosen.split != "train":
        advice = f"give a path without {chosen.path}"
    raise UserError(f"{key}.path: {folder} holds files of several splits ({named}); {advice}")


def files_of_split(files: Sequence[Path], folder: Path, split: str, key: str) -> tuple[list[Path], list[Path]]:
    """The files below `folder` of one split, and the others. Raises UserError if it has none."""
    wanted = _words(split)
    twins = {path: [mark.split] for path, mark in _twins(files, folder).items()}
    found = [path for path in files if _is_of(path.relative_to(folder), wanted) or twins.get(path) == wanted]
    if not found:
        marks = sorted({mark.split for path in files if (mark := _mark(path, folder))})
        has = f"their names tell of {', '.join(marks)}" if marks else f"the first is {files[0].relative_to(folder)}"
        raise UserError(f"{key}.split: none of the {len(files)} files in {folder} is of split {split!r}; {has}")
    chosen = {*found}
    return found, [path for path in files if path not in chosen]


def _is_of(name: Path, wanted: list[str]) -> bool:
    index = _deciding_part(name)
    parts = [_words(part) for part in (name.parts if index is None else [name.parts[index]])]
    return any(words[at : at + len(wanted)] == wanted for words in parts for at in range(len(words)))


def _mark(path: Path, folder: Path) -> _Mark | None:
    name = path.relative_to(folder)
    index = _deciding_part(name)
    if index is None or path.suffix.lower() == ".md":  # docs/testing.md is about tests
        return None
    part = name.parts[index]
    found = next(found for found in _WORD.finditer(part.lower()) if _split(found[0]) in _NAMES)
    words = [word for word in _words(part.partition(".")[0]) if not word.isdigit() and word != "of"]
    return _Mark(_split(found[0]), _pattern(name, index, found.end(), folder), len(words) == 1)


def _twins(files: Sequence[Path], folder: Path) -> dict[Path, _Mark]:
    """Files whose names differ in nothing but a split within a word, as mytrain.jsonl and mytest.jsonl do."""
    alike: dict[str, dict[Path, _Mark]] = defaultdict(dict)
    for path in files:
        name = path.relative_to(folder)
        for index, part in enumerate(name.parts if path.suffix.lower() != ".md" else ()):
            for found in _WITHIN_WORD.finditer(part.lower()):
                rest = "/".join([*name.parts[:index], f"{part[: found.start()]}*{part[found.end() :]}"]).lower()
                mark = _Mark(_SPLITS[found[0]], _pattern(name, index, found.end(), folder), False)
                alike[re.sub("[-_ ]", "", rest)].setdefault(path, mark)
    several = [marks for marks in alike.values() if len({mark.split for mark in marks.values()}) > 1]
    return {path: mark for marks in several for path, mark in marks.items()}


def _pattern(name: Path, index: int, end: int, folder: Path) -> Path:
    """What stands for a split that part `index` of a name names up to character `end`: a folder or a pattern."""
    part = name.parts[index]
    is_file = index == len(name.parts) - 1
    ours = f"{part[:end]}*{''.join(part[end:].partition('.')[1:])}" if is_file else part
    return folder.joinpath(*name.parts[:index], ours)


def _deciding_part(name: Path) -> int | None:
    """The index of the part of a path that names the split: the file, else the innermost folder that does."""
    naming = [index for index, part in enumerate(name.parts) if not _NAMES.isdisjoint(_words(part))]
    return naming[-1] if naming else None


def _words(name: str) -> list[str]:
    return [_split(word) for word in _WORD.findall(name.lower())]


def _split(word: str) -> str:
    return _SPLITS.get(re.sub("[-_ ]", "", word), word)
