"""Scores held-out documents one by one, unpacked from their rows, in one process."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import torch

from data_prep.encode import IGNORED
from trainer.evaluation.loaded_models import CausalLM
from trainer.objective.batches import Batch, collate, move, of_labelled
from trainer.objective.chunked_logits import ChunkedLogits, token_losses
from trainer.objective.packed_forward import packed_forward

Document = dict[str, np.ndarray]  # a row of one document, see data_prep.reader.PreparedSet

BATCH = 8  # documents per forward


@dataclass(frozen=True)
class Scores:
    """Per document: fp64 [documents], exact bool [documents].

    loss: sum over the labelled tokens, in nats. exact: whether every labelled token is the likeliest given those before
    it, so that greedy decoding would produce them all.
    """

    loss: np.ndarray
    labelled_tokens: np.ndarray
    exact: np.ndarray

    def mean_loss(self, chosen: np.ndarray | slice = slice(None)) -> float:
        """Nats per labelled token of the chosen documents."""
        return float(self.loss[chosen].sum() / self.labelled_tokens[chosen].sum())

    def exact_share(self, chosen: np.ndarray | slice = slice(None)) -> float:
        return float(self.exact[chosen].mean())


def first_documents(rows: Iterable[dict[str, Any]], tasks: int, count: int) -> list[Document]:
    """The first `count` documents of each task that have labelled tokens, in the order of rows."""
    taken: Counter[int] = Counter()
    documents = []
    for row in rows:
        for document in _documents(row):
            task = int(document["task_ids"][0])
            if taken[task] < count and (document["labels"][1:] != IGNORED).any():
                taken[task] += 1
                documents.append(document)
        if sum(taken.values()) == tasks * count:
            break
    return documents


def _documents(row: dict[str, Any]) -> Iterator[Document]:
    """The documents of a packed row: each starts at position 0."""
    columns = {name: np.asarray(row[name]) for name in ("input_ids", "labels", "position_ids", "task_ids")}
    starts = [*np.flatnonzero(columns["position_ids"] == 0), len(columns["position_ids"])]
    for start, end in pairwise(starts):
        yield {name: values[start:end] for name, values in columns.items()}


@torch.no_grad()
def score(model: CausalLM, documents: Sequence[Document], on_batch: Callable[[Batch], None] | None = None) -> Scores:
    """Runs the model on the documents. on_batch: called with each batch before its forward."""
    loss, labelled, exact = (np.zeros(len(documents)) for _ in range(3))
    logits = ChunkedLogits(model)
    by_length = sorted(range(len(documents)), key=lambda i: len(documents[i]["input_ids"]))
    for start in range(0, len(by_length), BATCH):
        indices = by_length[start : start + BATCH]
        batch = move(collate([documents[i] for i in indices]), model.device)
        if on_batch is not None:
            on_batch(batch)
        loss[indices], labelled[indices], exact[indices] = _score_batch(logits, packed_forward(model, batch), batch)
    return Scores(loss, labelled, exact.astype(bool))


def _score_batch(logits: ChunkedLogits, forward: Callable[[], Any], batch: Batch) -> np.ndarray:
    """[3, rows]: loss, number of labelled tokens, whether all of them are the likeliest."""
    rows, length = batch["labels"].shape
    targets = of_labelled(batch["labels"], batch)

    def columns(found: torch.Tensor, where: slice) -> torch.Tensor:
        losses, missed = token_losses(found, targets[where]), found.argmax(-1) != targets[where]
        return torch.stack((losses, torch.ones_like(losses), missed.float()), 1)

    by_token = logits.map(forward, batch["predicting"], columns)
    sums = torch.zeros(3, rows, device=targets.device)
    sums.index_add_(1, batch["predicting"] // length, by_token.T)
    sums[2] = sums[2] == 0
    return sums.double().cpu().numpy()
