"""Counts what is read, so that a preparation can show that it lost nothing."""

from collections import Counter
from collections.abc import Iterator

from data_prep.sources.blocks import Block
from data_prep.split import Split
from data_prep.spool import Removals
from data_prep.workers import EncodedBlock

_LISTED = 5  # control tokens named in a remark


class Tally:
    """Rows read from all sources, further pieces of split documents, and control tokens found in texts by source."""

    def __init__(self) -> None:
        self._rows = self._further_pieces = 0
        self._tokens_in_text: dict[int, Counter[str]] = {}

    def counted(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The blocks, unchanged; their rows are counted as they pass."""
        for block in blocks:
            self._rows += len(block.rows)
            yield block

    def add(self, encoded: EncodedBlock) -> None:
        """Adds what encoding a block has shown."""
        self._further_pieces += encoded.further_pieces
        self._tokens_in_text.setdefault(encoded.block.source, Counter()).update(encoded.tokens_in_text)

    def check_nothing_lost(self, split: Split, removals: Removals) -> None:
        """Raises RuntimeError unless every row read is for training, held out or counted as removed.

        Pieces of split documents count one by one. Training documents that mixing leaves out count as training.
        """
        read = self._rows + self._further_pieces
        train, held_out, removed = len(split.train), len(split.held_out), removals.counts.total()
        if train + held_out + removed != read:
            raise RuntimeError(
                f"{read} documents and pieces were read, but {train} are for training, {held_out} held out and "
                f"{removed} removed, which makes {train + held_out + removed}: this is a bug of data_prep"
            )

    def tokens_in_text(self, source: int) -> str:
        """Which control tokens the documents of a source hold in their text, the most frequent first; empty if none."""
        counts = self._tokens_in_text.get(source, Counter())
        found = sorted(counts.items(), key=lambda entry: (-entry[1], entry[0]))
        more = f", and {len(found) - _LISTED} others" if len(found) > _LISTED else ""
        return ", ".join(f"{token} in {count:,}" for token, count in found[:_LISTED]) + more
