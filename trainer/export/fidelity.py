"""What an export costs: how far the exported model's predictions are from the run's, on held-out rows, by task.

Both models are run on the same rows. A token's KL divergence is KL(run || exported) in nats over the whole vocabulary.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data_prep.encode import IGNORED
from trainer.objective.batches import Batch

AT_ONCE = 256  # tokens whose distributions over the vocabulary are held in fp32
ALL = "all"

Score = Callable[[nn.Module], dict[str, float]]  # a model -> {task: score}, such as exact match


@dataclass(frozen=True)
class TaskFidelity:
    """One task's labelled held-out tokens; nats a token, None without tokens. Scores are None where none were taken."""

    task: str
    tokens: int
    kl: float | None
    loss_before: float | None
    loss_after: float | None
    score_before: float | None = None
    score_after: float | None = None


def measure(
    before: nn.Module, after: nn.Module, batches: Iterable[Batch], tasks: Sequence[str], score: Score | None = None
) -> list[TaskFidelity]:
    """Compares two causal LMs on labelled tokens: a line for each task that has some, or scores, and one of all."""
    sums = torch.zeros(len(tasks), 4, dtype=torch.float64)
    for batch in batches:
        sums += _sums(before, after, batch, len(tasks))
    scores = [score(before), score(after)] if score is not None else [{}, {}]
    prices = [
        _fidelity(task, line, [found.get(task) for found in scores]) for task, line in zip(tasks, sums, strict=True)
    ]
    of_all = [sum(found.values()) / len(found) if found else None for found in scores]
    lines = [*prices, _fidelity(ALL, sums.sum(0), of_all)]
    return [line for line in lines if line.tokens or line.score_before is not None]


def _fidelity(task: str, sums: Tensor, scores: Sequence[float | None]) -> TaskFidelity:
    """sums: as _sums gives them for one task."""
    means = (sums[1:] / sums[0]).tolist() if sums[0] else [None] * 3
    return TaskFidelity(task, int(sums[0]), *means, *scores)


def table(prices: Sequence[TaskFidelity]) -> str:
    """Losses and KL by task, and scores where there are some."""
    scored = any(price.score_before is not None for price in prices)
    head = ["task", "tokens", "KL a token", "loss before", "after", *(["score before", "after"] if scored else [])]
    lines = [head, *(_cells(price, scored) for price in prices)]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    return "\n".join(
        "  ".join([line[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(line[1:], widths[1:], strict=True))])
        for line in lines
    )


def _cells(price: TaskFidelity, scored: bool) -> list[str]:
    cells = [price.task, str(price.tokens), _cell(price.kl, ".2e")]
    cells += [_cell(loss, ".4f") for loss in (price.loss_before, price.loss_after)]
    if scored:
        cells += [_cell(score, ".1%") for score in (price.score_before, price.score_after)]
    return cells


def _cell(value: float | None, form: str) -> str:
    return "-" if value is None else f"{value:{form}}"


@torch.no_grad()
def _sums(before: nn.Module, after: nn.Module, batch: Batch, num_tasks: int) -> Tensor:
    """fp64 [tasks, 4] over a batch's labelled tokens: their number, KL, loss before and loss after."""
    targets = batch["labels"][:, 1:]
    labelled = targets != IGNORED
    logits = [_labelled_logits(model, batch, labelled) for model in (before, after)]
    columns = []
    for one, other, wanted in zip(*(whole.split(AT_ONCE) for whole in (*logits, targets[labelled])), strict=True):
        p, q = (F.log_softmax(part.float(), -1).cpu() for part in (one, other))
        kl = F.kl_div(q, p, reduction="none", log_target=True).sum(-1)
        losses = (F.nll_loss(part, wanted, reduction="none") for part in (p, q))
        columns.append(torch.stack([torch.ones_like(kl), kl, *losses], 1))
    by_token = torch.cat(columns).double()
    return torch.zeros(num_tasks, 4, dtype=torch.float64).index_add(0, batch["task_ids"][:, 1:][labelled], by_token)


def _labelled_logits(model: nn.Module, batch: Batch, labelled: Tensor) -> Tensor:
    """[labelled tokens, vocabulary], at the positions that predict them; labelled: bool [batch, seq - 1]."""
    device = next(model.parameters()).device

    def select(_head: nn.Module, args: tuple[Tensor]) -> tuple[Tensor]:
        return (args[0][:, :-1][labelled.to(device)],)

    hook = model.get_output_embeddings().register_forward_pre_hook(select)
    try:
        ids, positions = (batch[key].to(device) for key in ("input_ids", "position_ids"))
        return model(input_ids=ids, position_ids=positions, use_cache=False).logits
    finally:
        hook.remove()
