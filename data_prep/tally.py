"""Counts what is read, by source, so that a preparation can report it and show that it lost nothing."""

from collections.abc import Iterator

from data_prep.sources.blocks import Block
from data_prep.split import Split
from data_prep.spool import Removals
from data_prep.workers import EncodedBlock, SourceCounts


class Tally:
    """Rows read from all sources, further pieces of split documents, and what each source holds."""

    def __init__(self) -> None:
        self.sources: dict[int, SourceCounts] = {}  # by index of the source
        self._rows = self._further_pieces = 0

    def counted(self, blocks: Iterator[Block]) -> Iterator[Block]:
        """The blocks, unchanged; their rows are counted as they pass."""
        for block in blocks:
            self._rows += len(block.rows)
            yield block

    def add(self, encoded: EncodedBlock) -> None:
        """Adds what encoding a block has shown."""
        self._further_pieces += encoded.further_pieces
        self.sources.setdefault(encoded.block.source, SourceCounts()).add(encoded.counts)

    def has_conversations(self) -> bool:
        """Whether any document is a conversation, which needs a chat template."""
        return any(set(counts.forms) - {"text"} for counts in self.sources.values())

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
