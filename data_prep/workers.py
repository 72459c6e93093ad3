"""All cores: blocks of rows to encoded documents in worker processes, handed back in order."""

import contextlib
import gc
import multiprocessing
import os
import signal
import threading
from collections import Counter, deque
from collections.abc import Generator, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.duplicates import Signer
from data_prep.encode import BAD_ROW, Encoded, Encoder, Removed
from data_prep.items import item_of
from data_prep.sources.blocks import Block
from data_prep.sources.read import DocumentMaker
from data_prep.split import may_be_held_out
from data_prep.user_error import UserError

_AHEAD = 3  # blocks a worker that are read and not yet handed back

# What preparation keeps in memory of a document (or a piece of one): 69 bytes, some 220 while they are split and drawn.
DOCUMENT = np.dtype(
    [
        ("task", "i4"),  # index into the tasks
        ("file", "i4"),  # index into the places of blocks
        ("number", "i8"),  # row in that file
        ("piece", "i4"),
        ("cut", "?"),
        ("high", "u8"),  # the digest, in two halves
        ("low", "u8"),
        ("learned", "u4"),  # its mark
        ("tokens", "i4"),
        ("labelled", "i4"),
        ("start", "i8"),  # first token among all tokens
        ("item", "i4"),  # bytes of the held-out item it would make
        ("item_start", "i8"),
    ]
)


@dataclass(frozen=True)
class Removal:
    """A document taken out of a task."""

    task: int
    reason: str
    place: str  # as that of encode.Removed


@dataclass(frozen=True, slots=True)
class _Row:
    """What is kept of a document beside its tokens."""

    number: int
    digest: bytes
    learned: int
    item: bytes  # empty where it is none, or cannot be held out


@dataclass(frozen=True)
class EncodedBlock:
    """What becomes of a block. start, item_start and file of the documents are not set yet."""

    block: Block  # without its rows
    documents: np.ndarray  # DOCUMENT [documents]
    input_ids: np.ndarray  # int32 [tokens], document after document
    scored: np.ndarray  # bool [tokens]
    items: bytes  # JSON lines of held-out items, document after document
    signatures: np.ndarray | None  # uint32 [documents, permutations], for near duplicates
    removals: list[Removal]
    forms: Counter[str]


class BlockEncoder:
    """Encodes blocks, in the process that made it."""

    def __init__(self, config: DataConfig, tokenizer: Any) -> None:
        self._config = config
        self._tasks = {task: index for index, task in enumerate(config.tasks)}
        self._maker = DocumentMaker(config)
        self._encoder = Encoder(tokenizer, config)
        self._signer = Signer() if config.cleaning.near_duplicates is not None else None

    def __call__(self, block: Block) -> EncodedBlock:
        """Raises UserError for a row that cannot be read, unless the recipe has such rows dropped."""
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
        for result in self._encoder.encode(documents):
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
            Counter(document.form for document in documents),
        )

    def _row(self, number: int, document: Document) -> _Row:
        config = self._config
        digest = document.digest(config.seed, config.system_prompt)
        (may,) = may_be_held_out(np.frombuffer(digest[:8], ">u8"), config.held_out)
        item = item_of(document, config) if may else b""
        return _Row(number, digest, document.learned_mark(config.mask_history), item)


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
    """Every block encoded, in order, on all cores this process may use.

    Few blocks are in memory at any time. Raises UserError for what a block holds, and where a worker is killed.
    """
    count = len(os.sched_getaffinity(0))
    # The workers are forked before anything here has tokenised, so that they share memory and start at once.
    context = multiprocessing.get_context("fork")
    with ProcessPoolExecutor(count, context, _start, (config, tokenizer)) as pool:
        waiting: deque[Future[EncodedBlock]] = deque()
        try:
            for block in blocks:
                with _interrupts_held_back():  # for good in the workers, which are forked here: the parent ends them
                    waiting.append(pool.submit(_encode, block))
                if len(waiting) > _AHEAD * count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        except BrokenProcessPool as error:
            raise UserError(
                "data.sources: a worker process was killed, most likely for want of memory; free some, or use fewer "
                "cores (taskset)"
            ) from error
        finally:
            pool.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def _interrupts_held_back() -> Iterator[None]:
    """Has a Ctrl-C wait until the block ends; processes forked in it never see one."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


_encoder: BlockEncoder | None = None  # of a worker process; the pool hands its functions nothing that lasts


def _start(config: DataConfig, tokenizer: Any) -> None:
    global _encoder
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # a process a core is enough
    threading.Thread(target=_end_with_parent, daemon=True).start()
    gc.freeze()  # what the parent had made stays shared, and is not gone through again and again
    gc.set_threshold(100_000)  # a block is many small objects, none of them in a cycle
    _encoder = BlockEncoder(config, tokenizer)


def _end_with_parent() -> None:
    multiprocessing.parent_process().join()
    os._exit(1)


def _encode(block: Block) -> EncodedBlock:
    return _encoder(block)
