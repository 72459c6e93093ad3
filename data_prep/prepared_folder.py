"""The folder of a prepared set: its rows and items, and the lock that lets one process at a time write it."""

import contextlib
import fcntl
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import numpy as np

from data_prep.config import DataConfig
from data_prep.encode import labels_of
from data_prep.manifest import MANIFEST, WrittenRows
from data_prep.packing import pack_in_windows
from data_prep.publish import blame_option, sweep
from data_prep.spool import Spool
from data_prep.user_error import UserError

ITEMS = "items.jsonl"
_COLUMNS = ("input_ids", "labels", "position_ids", "task_ids")


def refuse_foreign_folder(directory: Path) -> None:
    """Raises UserError if `directory` holds anything but a prepared set, which would then be replaced."""
    if directory.exists() and not directory.is_dir():
        raise UserError(f"data.prepared_dir: {directory} is a file; give a folder that does not exist yet")
    if directory.is_dir() and any(directory.iterdir()) and not (directory / MANIFEST).exists():
        raise UserError(
            f"data.prepared_dir: {directory} holds files but no prepared set, and would be replaced; give "
            "another folder, or empty this one"
        )


@contextlib.contextmanager
def exclusive_preparation(directory: Path, say: Callable[[str], None]) -> Iterator[None]:
    """Keeps other processes from preparing `directory` while the block runs; waits, and says so, if one already does.

    Removes what killed preparations have left beside the folder. Where the file system has no locks, says so and goes
    on. Raises UserError if the file of the lock cannot be written.
    """
    directory = directory.resolve()
    path = directory.with_name(f".{directory.name}.lock")
    with contextlib.ExitStack() as files:
        with blame_option("data.prepared_dir", directory):
            directory.parent.mkdir(parents=True, exist_ok=True)
            file = files.enter_context(path.open("ab"))
        locked = _lock(file.fileno(), directory, say)
        try:
            sweep(directory, locked)
            yield
        finally:
            if locked:
                fcntl.flock(file, fcntl.LOCK_UN)  # workers that still end have the file open too


def _lock(file: int, directory: Path, say: Callable[[str], None]) -> bool:
    """Waits for the lock, which the system releases when a process is killed; False where there are no locks.

    NFS without its lock service, Lustre mounted without `flock` and some FUSE file systems have none.
    """
    try:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except (BlockingIOError, PermissionError):  # the latter is how some NFS clients say it
            say(f"waiting: another process prepares {directory}")
            fcntl.flock(file, fcntl.LOCK_EX)
    except OSError as error:
        say(
            f"warning: {directory}: its file system has no locks ({error.strerror or error}), so two preparations at "
            "once are not kept apart; run one at a time"
        )
        return False
    return True


def write_rows(spool: Spool, order: np.ndarray, config: DataConfig, directory: Path) -> WrittenRows:
    """Packs documents into rows and writes them, window by window.

    order: indices of the documents, in training order. The file is an Arrow file of `datasets`, with int32 lists
    input_ids, labels, position_ids and task_ids, [tokens of the row] each.
    """
    import pyarrow as pa

    schema = pa.schema({name: pa.list_(pa.int32()) for name in _COLUMNS})
    lengths, task_rows = [np.zeros(0, np.int64)], np.zeros(len(config.tasks), np.int64)
    with pa.OSFile(str(_without_rows(directory)), "wb") as file, pa.ipc.new_stream(file, schema) as out:
        for rows in pack_in_windows(spool.documents["tokens"][order], config.seq_len):
            own = spool.documents[order[np.concatenate(rows)]]
            row_of = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
            row_tokens = np.bincount(row_of, own["tokens"]).astype(np.int64)
            ends = pa.array(np.concatenate([[0], np.cumsum(row_tokens)]), pa.int32())
            arrays = [pa.ListArray.from_arrays(ends, pa.array(column)) for column in _values(spool, own)]
            out.write_table(pa.table(arrays, schema))
            lengths.append(row_tokens)
            pairs = np.unique(np.stack([row_of, own["task"]]), axis=1)
            task_rows += np.bincount(pairs[1], minlength=len(config.tasks))
    return WrittenRows(np.concatenate(lengths), task_rows)


def _without_rows(directory: Path) -> Path:
    """Lets `datasets` save an empty dataset; returns its one Arrow file, for the caller to overwrite with rows.

    So the library writes everything but the rows, and no second copy of the rows is made.
    """
    from datasets import Dataset, Features, List, Value

    features = Features(dict.fromkeys(_COLUMNS, List(Value("int32"))))
    empty = Dataset.from_dict({name: [] for name in _COLUMNS}, features)
    empty._fingerprint = directory.name  # random by default, but the bytes must be reproducible
    empty.save_to_disk(directory, num_shards=1)
    (file,) = directory.glob("*.arrow")
    return file


def _values(spool: Spool, documents: np.ndarray) -> Iterator[np.ndarray]:
    """Values of _COLUMNS, int32 [tokens] each, for rows that hold these documents one after the other."""
    input_ids, scored = spool.tokens(documents)
    lengths = documents["tokens"]
    yield input_ids
    yield labels_of(input_ids, scored)
    starts = np.cumsum(lengths, dtype=np.int64) - lengths
    yield (np.arange(len(input_ids)) - np.repeat(starts, lengths)).astype(np.int32)
    yield np.repeat(documents["task"], lengths)


def write_items(items: Iterable[bytes], directory: Path) -> None:
    """Writes items.jsonl: the turns of every held-out conversation up to its last answer, and that answer."""
    with (directory / ITEMS).open("wb") as file:
        file.writelines(items)
