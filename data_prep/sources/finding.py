"""Finds the files that a path in the recipe stands for, and opens them."""

import glob
import gzip
import io
import lzma
import os
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from data_prep.config import FilesSource
from data_prep.sources.file_kind import COMPRESSIONS, first_bytes, lacks_compression, mistaken_for
from data_prep.sources.members import open_bz2, open_xz
from data_prep.sources.splits import files_of_split, refuse_several_splits
from data_prep.user_error import UserError

FORMATS = {
    ".jsonl": "json", ".ndjson": "json", ".json": "json", ".csv": "csv", ".tsv": "tsv", ".parquet": "parquet",
    ".arrow": "arrow", ".feather": "arrow", ".txt": "text", ".md": "text",
}  # fmt: skip
_ARCHIVES = (".zip", ".tar", ".tgz", ".tbz2", ".txz", ".7z", ".rar")
_BOOKKEEPING = {"dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json"}  # by `datasets`
_ABOUT = {"readme", "license"}  # describe a downloaded folder; its data is in other files
READ_ERRORS = (OSError, EOFError, zlib.error, lzma.LZMAError)  # raised when reading a damaged file


def find_files(source: FilesSource, key: str) -> tuple[list[Path], list[Path]]:
    """The source's files, sorted by name, and the files of a folder that are skipped.

    Does not follow links to folders, and opens no file. `key`: the source's key in the recipe, for errors. Raises
    UserError if there is no file, for files of several splits, and for one that is no regular file or whose name has
    the ending of an archive or of an unknown format.
    """
    skipped: list[Path] = []
    folder = source.path.parent  # names below it may name splits
    if os.path.isdir(source.path):  # unlike Path.is_dir, false for paths that cannot be looked up
        folder = source.path
        found, skipped = _in_folder(source, key)
    elif os.path.exists(source.path):
        found = [source.path]
    elif glob.has_magic(str(source.path)):
        folder = next(parent for parent in source.path.parents if not glob.has_magic(str(parent)))
        found = _matches(str(source.path))
        if not found:
            raise UserError(f"{key}.path: no file matches {source.path}; correct the pattern")
    else:
        raise UserError(f"{key}.path: {source.path} does not exist; expected a file, a pattern or a folder")
    for path in (*found, *skipped):
        if not _is_utf8(str(path)):  # neither manifest nor report could name it
            raise UserError(f"{key}.path: the name {str(path)!r} is not UTF-8; rename it")
    if source.split is None:
        refuse_several_splits(found, folder, key)
    else:
        found, others = files_of_split(found, folder, source.split, key)
        skipped = sorted([*skipped, *others])
    for path in found:
        if not os.path.isfile(path):
            raise UserError(f"{key}.path: {path} is not a regular file or a link to one; remove or correct it")
        if _without_compression(path).suffix.lower() in _ARCHIVES:
            raise UserError(f"{key}.path: {path} is an archive; unpack it, and give the folder")
        if format_of(path, source) is None:
            raise UserError(
                f"{key}.path: {path} does not end in {', '.join(FORMATS)} (with or without {', '.join(COMPRESSIONS)}); "
                f"set {key}.format"
            )
    return found, skipped


def format_of(path: Path, source: FilesSource) -> str | None:
    """A file's format, by the recipe or else by its ending; None for an unknown ending."""
    return source.format or FORMATS.get(_without_compression(path).suffix.lower())


def is_compressed(path: Path) -> bool:
    return path.suffix.lower() in COMPRESSIONS


def open_file(path: Path) -> io.BufferedReader:
    """Opens a file for reading its decompressed bytes. Damaged and truncated files raise one of READ_ERRORS."""
    openers: dict[str, Callable[[Path], Any]] = {
        ".gz": gzip.open, ".bz2": open_bz2, ".xz": open_xz, ".zst": _open_zst
    }  # fmt: skip
    opener = openers.get(path.suffix.lower())
    return path.open("rb") if opener is None else io.BufferedReader(opener(path))


def unreadable_file(path: Path, error: Exception, key: str) -> UserError:
    """The error for a file that cannot be read to its end."""
    cause = " ".join(str(getattr(error, "strerror", None) or error).split())
    advice = "give a readable file"
    if is_compressed(path) and not getattr(error, "errno", None):  # errno: it could not be opened
        advice = "it is truncated or damaged, download it again"
        if isinstance(error, lzma.LZMAError) and "Memory usage limit" in cause:
            advice = "compress it again with a smaller dictionary, as `xz -9` does"
        elif lacks_compression(first_bytes(path), path.suffix.lower()):
            advice = f"it is not compressed, remove {path.suffix} from its name"
    return UserError(f"{key}.path: cannot read {path} ({cause}); {advice}")


def _open_zst(path: Path) -> Any:
    import pyarrow

    return pyarrow.input_stream(str(path), compression="zstd")


def refuse_other_kind(path: Path, source: FilesSource, key: str) -> None:
    """Raises UserError for a file whose first bytes show that it is not what its name says, or that cannot be read."""
    try:
        start = first_bytes(path)
    except OSError as error:
        raise unreadable_file(path, error, key) from error
    if what := mistaken_for(start, format_of(path, source), path.suffix.lower()):
        raise UserError(f"{key}.path: {path} is {what}")


def _split_folder(source: FilesSource, key: str) -> Path:
    """The folder to read: among several splits as `datasets` saves them, that of the source's split."""
    folder = source.path
    if os.path.exists(folder / "dataset_dict.json"):
        if source.split is None:
            raise UserError(f"{key}.path: {folder} holds several splits; give one of them, such as {folder / 'train'}")
        if not os.path.isdir(folder / source.split):
            raise UserError(f"{key}.split: {folder} has no split {source.split!r}; give the name of one of its folders")
        return folder / source.split
    if len(snapshots := sorted(folder.glob("snapshots/*"))) > 1 and os.path.isdir(folder / "blobs"):
        raise UserError(
            f"{key}.path: {folder} holds {len(snapshots)} versions in the Hub's cache; give one, such as {snapshots[0]}"
        )
    return folder


def _in_folder(source: FilesSource, key: str) -> tuple[list[Path], list[Path]]:
    found = sorted(_walk(_split_folder(source, key), key))
    skipped = [path for path in found if _is_skipped(path, source)]
    if len(skipped) == len(found):
        raise UserError(
            f"{key}.path: folder {source.path} has no file that ends in {', '.join(FORMATS)}; give another folder, or "
            f"set {key}.format"
        )
    return [path for path in found if not _is_skipped(path, source)], skipped


def _walk(folder: Path, key: str) -> Iterator[Path]:
    """Files, and links to folders, except hidden ones and what `datasets` keeps beside its files."""

    def refuse(error: OSError) -> None:
        raise unreadable_file(Path(error.filename), error, key) from error

    for parent, folders, names in os.walk(folder, onerror=refuse):
        folders[:] = [name for name in folders if not name.startswith(".")]
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        kept = [name for name in names if not name.startswith(".") and name not in _BOOKKEEPING]
        yield from (Path(parent) / name for name in [*kept, *links])


def _is_skipped(path: Path, source: FilesSource) -> bool:
    about = path.stem.lower() in _ABOUT or (path.name.startswith("cache-") and path.suffix == ".arrow")
    return about or format_of(path, source) is None or os.path.isdir(path)


def _matches(pattern: str) -> list[Path]:
    """Matching files, each once: ** also follows links to folders, even in circles."""
    found: dict[tuple[str, str], Path] = {}
    for name in sorted(glob.glob(pattern, recursive=True), key=lambda name: (name.count(os.sep), name)):
        if not os.path.isdir(name):
            folder, file = os.path.split(name)
            found.setdefault((os.path.realpath(folder), file), Path(name))
    return sorted(found.values())


def _is_utf8(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def _without_compression(path: Path) -> Path:
    return path.with_suffix("") if is_compressed(path) else path
