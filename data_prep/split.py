"""The held-out split: by each document's own hash, so that it stays put when data is added."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from data_prep.encode import Dropped, Encoded
from data_prep.errors import UserError

DUPLICATE_OF_HELD_OUT = "duplicate_of_held_out"


@dataclass
class Split:
    """Encoded documents in the order of their sources."""

    train: list[Encoded] = field(default_factory=list)
    held_out: list[Encoded] = field(default_factory=list)
    dropped: list[Dropped] = field(default_factory=list)


def split_documents(documents: Sequence[Encoded], held_out: float | int, seed: int) -> Split:
    """Keeps a fraction, or a count per task, of the different documents from training.

    No held-out document is in the training split, under any task, nor twice in the held-out one under the same
    task: such copies are dropped. Copies within the training split stay, since people weight data that way.
    Raises UserError where a task has too few different documents for the count.
    """
    digests = [encoded.document.digest(seed) for encoded in documents]
    by_task: dict[str, set[bytes]] = {}
    for encoded, digest in zip(documents, digests, strict=True):
        by_task.setdefault(encoded.document.task, set()).add(digest)
    kept = {task: _choose(task, found, held_out) for task, found in by_task.items()}
    anywhere = set().union(*kept.values())

    split = Split()
    for encoded, digest in zip(documents, digests, strict=True):
        if digest not in anywhere:
            split.train.append(encoded)
        elif digest in kept[encoded.document.task]:
            split.held_out.append(encoded)
            kept[encoded.document.task].discard(digest)
        else:
            split.dropped.append(Dropped(encoded.document, DUPLICATE_OF_HELD_OUT))
    return split


def _choose(task: str, digests: set[bytes], held_out: float | int) -> set[bytes]:
    if isinstance(held_out, float):
        return {digest for digest in digests if int.from_bytes(digest[:8], "big") < held_out * 2**64}
    if len(digests) <= held_out:
        raise UserError(
            f"data.held_out: {held_out} documents per task, but task {task!r} has {len(digests)} different ones, of "
            "which at least one must be left to train on; lower data.held_out or add documents"
        )
    return set(sorted(digests)[:held_out])
