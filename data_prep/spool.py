"""Encoded documents on disk during preparation; in memory only the fields that decide about them."""

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from contextlib import ExitStack
from itertools import islice
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from data_prep.sources.blocks import Block
from data_prep.workers import DOCUMENT, EncodedBlock

_LISTED = 10  # places kept per task and reason


class Removals:
    """Counts of removed documents by task and reason, and the places of the first of each."""

    def __init__(self) -> None:
        self.counts: Counter[tuple[int, str]] = Counter()
        self.first: defaultdict[tuple[int, str], list[str]] = defaultdict(list)

    def add(self, task: int, reason: str, count: int, places: Iterable[str]) -> None:
        """Counts removed documents of a task. places: where they are; only the first ones are read."""
        self.counts[task, reason] += count
        first = self.first[task, reason]
        first += islice(places, _LISTED - len(first))

    def by_task(self, tasks: list[str]) -> dict[str, dict[str, Any]]:
        """Counts and first places by task and reason, the most common reason first."""
        return {
            task: {
                reason: {"documents": count, "first": self.first[index, reason]}
                for (of, reason), count in self.counts.most_common()
                if of == index
            }
            for index, task in enumerate(tasks)
        }


class Spool:
    """Token ids, labels and held-out items of all documents, in files in `folder`.

    Only `documents`, DOCUMENT [documents], stays in memory, in source order.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._files = ExitStack()
        self._out = {
            name: self._files.enter_context((folder / name).open("wb")) for name in ("input_ids", "scored", "items")
        }
        self._parts: list[np.ndarray] = []
        self._places: dict[tuple[str, bool], int] = {}  # in the order of their indices
        self._tokens = self._item_bytes = 0
        self.documents = np.zeros(0, DOCUMENT)

    def __enter__(self) -> "Spool":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._files.close()
        self._input_ids = self._scored = np.zeros(0)  # closes the maps: NFS removes no folder with files in use

    def add(self, encoded: EncodedBlock) -> None:
        """Adds the documents of a block. Raises OSError if the disk is full."""
        documents = encoded.documents
        place = (encoded.block.place, encoded.block.by_line)
        documents["file"] = self._places.setdefault(place, len(self._places))
        for start, size, offset in (("start", "tokens", self._tokens), ("item_start", "item", self._item_bytes)):
            documents[start] = offset + np.cumsum(documents[size], dtype=np.int64) - documents[size]
        self._out["input_ids"].write(encoded.input_ids.data)
        self._out["scored"].write(encoded.scored.data)
        self._out["items"].write(encoded.items)
        self._tokens += len(encoded.input_ids)
        self._item_bytes += len(encoded.items)
        self._parts.append(documents)

    def finish(self) -> None:
        """Ends writing; from here on documents can be read."""
        self._files.close()
        self.documents = np.concatenate([self.documents, *self._parts])
        self._parts.clear()
        self._input_ids = self._map("input_ids", np.int32)
        self._scored = self._map("scored", bool)

    def origins(self, which: np.ndarray) -> Iterator[str]:
        """Where the documents with these indices are in the sources."""
        places = list(self._places)
        for document in (self.documents[index] for index in which):
            place, by_line = places[document["file"]]
            yield Block(0, place, by_line, []).origin(int(document["number"]))

    def tokens(self, documents: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """input_ids, int32 [tokens], and scored, bool [tokens], of these documents, concatenated."""
        starts, lengths = documents["start"].tolist(), documents["tokens"].tolist()
        places = [slice(start, start + length) for start, length in zip(starts, lengths, strict=True)]
        return (
            np.concatenate([self._input_ids[:0], *(self._input_ids[place] for place in places)]),
            np.concatenate([self._scored[:0], *(self._scored[place] for place in places)]),
        )

    def items(self, which: np.ndarray) -> Iterator[bytes]:
        """Held-out items of the documents with these indices, as JSON lines; some documents have none."""
        with (self._folder / "items").open("rb") as file:
            for document in (self.documents[index] for index in which):
                if document["item"]:
                    file.seek(document["item_start"])
                    yield file.read(document["item"])

    def _map(self, name: str, dtype: type) -> np.ndarray:
        path = self._folder / name
        if not path.stat().st_size:  # an empty file cannot be mapped
            return np.zeros(0, dtype)
        return np.asarray(np.memmap(path, dtype, "r"))
