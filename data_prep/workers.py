"""Encodes blocks of rows on all cores, in worker processes, and returns the results in order.

torch's DataLoader would not do: it lets every worker read the sources itself, while here one process reads and the
workers encode. It would also import torch, which preparing does not need.
"""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.duplicates import MinHasher
from data_prep.encode import BAD_ROW, Encoded, Encoder, Removed
from data_prep.items import held_out_item
from data_prep.resource_limits import usable_cpus
from data_prep.sources.blocks import Block
from data_prep.sources.read import DocumentMaker
from data_prep.split import may_be_held_out
from data_prep.user_error import UserError

_AHEAD = 3  # blocks per worker that are read ahead

# Kept in memory per document (or piece of one): 69 bytes, about 220 during splitting and drawing.
DOCUMENT = np.dtype(
    [
        ("task", "i4"),  # index into the tasks
        ("file", "i4"),  # index into the blocks' places
        ("number", "i8"),  # row number in that file
        ("piece", "i4"),
        ("cut", "?"),
        ("high", "u8"),  # first half of the digest
        ("low", "u8"),  # second half
        ("learned", "u4"),  # Document.learned_mark
        ("tokens", "i4"),
        ("labelled", "i4"),
        ("start", "i8"),  # index of its first token among all tokens
        ("item", "i4"),  # bytes of its held-out item, 0 if it has none
        ("item_start", "i8"),  # index of the item's first byte among all items
    ]
)


@dataclass(frozen=True)
class Removal:
    """A document removed from a task."""

    task: int
    reason: str
    place: str  # as in encode.Removed


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of a document apart from its tokens."""

    number: int
    digest: bytes
    learned: int
    item: bytes  # empty if there is none, or the document is not held out


@dataclass
class SourceCounts:
    """What was found in the rows of one source, or of a part of it."""

    forms: Counter[str] = field(default_factory=Counter)  # documents by form
    unread: Counter[str] = field(default_factory=Counter)  # rows by what is not read of them, as in Document.unread
    tokens_in_text: Counter[str] = field(default_factory=Counter)  # documents by control token in their text
    with_tools: int = 0  # documents that give tools

    def add(self, other: "SourceCounts") -> None:
        self.forms += other.forms
        self.unread += other.unread
        self.tokens_in_text += other.tokens_in_text
        self.with_tools += other.with_tools


@dataclass(frozen=True)
class EncodedBlock:
    """The result of encoding a block. The documents' fields start, item_start and file are not set yet."""

    block: Block  # without its rows
    documents: np.ndarray  # DOCUMENT [documents]
    input_ids: np.ndarray  # int32 [tokens], document after document
    scored: np.ndarray  # bool [tokens]: whether the token is a label
    items: bytes  # held-out items as JSON lines, document after document
    signatures: np.ndarray | None  # uint32 [documents, permutations], for near duplicates
    removals: list[Removal]
    counts: SourceCounts
    further_pieces: int  # of split documents, beyond their first


class BlockEncoder:
    """Encodes blocks in the current process."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self._config = config
        self._tasks = {task: index for index, task in enumerate(config.tasks)}
        self._maker = DocumentMaker(config)
        self._encoder = Encoder(tokenizer, config)
        self._signer = MinHasher() if config.cleaning.near_duplicates is not None else None

    def __call__(self, block: Block) -> EncodedBlock:
        """Raises UserError for a row that cannot be read, unless the recipe drops bad rows."""
        task = self._tasks[self._config.sources[block.source].task]
        rows: dict[str, _Row] = {}  # by the origin of their documents
        documents, removals = [], []
        for number, document in self._maker.documents(block):
            try:
                if isinstance(document, UserError):
                    raise document
                rows[document.origin] = self._row(number, document)
                documents.append(document)
            except UserError as error:
                if self._config.cleaning.bad_rows == "refuse":
                    raise
                removals.append(Removal(task, BAD_ROW, str(error)))
        encoded: list[Encoded] = []
        results = self._encoder.encode(documents)
        for result in results:
            if isinstance(result, Removed):
                removals.append(Removal(task, result.reason, result.place))
            else:
                encoded.append(result)
        own = [rows[e.document.origin] for e in encoded]
        items = [b"" if row is before else row.item for row, before in zip(own, [None, *own], strict=False)]
        return EncodedBlock(
            Block(block.source, block.place, block.by_line, []),
            _describe(encoded, own, task, items),
            np.concatenate([np.empty(0, np.int32), *(e.input_ids for e in encoded)]),
            np.concatenate([np.empty(0, bool), *(e.scored for e in encoded)]),
            b"".join(items),
            None if self._signer is None else self._signer.sign([e.document for e in encoded]),
            removals,
            SourceCounts(
                Counter(document.form for document in documents),
                _not_read(block, documents, results),
                Counter(token for result in results if not result.piece for token in result.remarks.tokens_in_text),
                sum(bool(document.tools) for document in documents),
            ),
            sum(result.piece > 0 for result in results),
        )

    def _row(self, number: int, document: Document) -> _Row:
        config = self._config
        digest = document.digest(config.seed, config.system_prompt)
        (may,) = may_be_held_out(np.frombuffer(digest[:8], ">u8"), config.held_out)
        item = held_out_item(document, config) if may else b""
        return _Row(number, digest, document.learned_mark(config.mask_history), item)


def _not_read(block: Block, documents: Sequence[Document], results: Sequence[Encoded | Removed]) -> Counter[str]:
    """Rows of a block by what is not read of them, in the file or by the chat template."""
    found = Counter(name for document in documents for name in document.unread)
    found.update(dict.fromkeys(block.unread, len(block.rows)))
    found.update(what for result in results if not result.piece for what in result.remarks.left_out)
    return found


def _describe(encoded: list[Encoded], rows: list[_Row], task: int, items: list[bytes]) -> np.ndarray:
    described = np.zeros(len(encoded), DOCUMENT)
    digests = np.frombuffer(b"".join(row.digest for row in rows), ">u8").reshape(-1, 2)
    described["task"] = task
    described["high"], described["low"] = digests[:, 0], digests[:, 1]
    described["number"] = [row.number for row in rows]
    described["learned"] = [row.learned for row in rows]
    described["piece"] = [e.piece for e in encoded]
    described["cut"] = [e.cut for e in encoded]
    described["tokens"] = [len(e) for e in encoded]
    described["labelled"] = [np.count_nonzero(e.scored) for e in encoded]
    described["item"] = [len(item) for item in items]
    return described


def encode_blocks(blocks: Iterator[Block], config: DataConfig, tokenizer: Any) -> Generator[EncodedBlock, None, None]:
    """Encodes all blocks, in order, on all cores that this process may use, with few blocks in memory at a time.

    Raises UserError for bad rows, and if a worker is killed.
    """
    count = usable_cpus()
    # Workers are forked before anything is tokenized here, so they share the tokenizer's memory and start at once.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, _start, (config, tokenizer)) as pool:
        waiting: deque[Future[EncodedBlock]] = deque()
        try:
            for block in blocks:
                with _interrupts_held_back():  # permanently in the workers, forked here; the parent ends them
                    waiting.append(pool.submit(_encode, block))
                if len(waiting) > _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "data.sources: a worker process was killed, most likely out of memory; free some, or use fewer "
                "cores (taskset)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Delays Ctrl-C until the block ends; processes forked inside never receive it."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: BlockEncoder | None = None  # of this worker process; the pool passes its functions no lasting objects


def _start(config: DataConfig, tokenizer: Any) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # there already is one process per core
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # keeps the parent's objects shared, and out of further collections
    gc.set_threshold(100_000)  # a block is many small objects, without cycles
    _encoder = BlockEncoder(config, tokenizer)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None  # this is a worker
    parent.join()
    os._exit(1)


def _encode(block: Block) -> EncodedBlock:
    assert _encoder is not None  # _start has set it
    return _encoder(block)
