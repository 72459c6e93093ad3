"""The loss over labelled tokens, with logits computed nowhere else and a chunk at a time."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import nn

from trainer.adapters.router_stats import RouterStats
from trainer.objective.batches import Batch, of_labelled
from trainer.objective.chunked_logits import ChunkedLogits, default_chunk
from trainer.objective.packed_forward import packed_forward
from trainer.recipe import Recipe


def loss_chunk(recipe: Recipe, vocabulary: int) -> int:
    """Labelled tokens whose logits are held at once, as the recipe says; 0: all of a micro-batch.

    All, too, where no micro-batch can have more. That follows from the recipe, not from a batch: only whole logits let
    ZeRO-3 gather the output embedding in backward, where all ranks must take part.
    """
    train = recipe.train
    chunk = default_chunk(vocabulary) if train.loss_chunk is None else train.loss_chunk
    return chunk if chunk < train.micro_batch_size * recipe.data.seq_len else 0


@dataclass(frozen=True)
class TaskLosses:
    """Sums over the labelled tokens of one or more batches, by task: fp32 [num_tasks]."""

    loss: torch.Tensor
    labelled_tokens: torch.Tensor

    def __add__(self, other: "TaskLosses") -> "TaskLosses":
        return TaskLosses(self.loss + other.loss, self.labelled_tokens + other.labelled_tokens)

    def mean(self) -> float:
        """Mean over all labelled tokens, in nats."""
        return float(self.loss.sum() / self.labelled_tokens.sum().clamp(min=1))

    def by_task(self, tasks: Sequence[str]) -> dict[str, float]:
        """Mean by task name, for the tasks that have labelled tokens."""
        columns = zip(tasks, self.loss.tolist(), self.labelled_tokens.tolist(), strict=True)
        return {task: loss / count for task, loss, count in columns if count}

    def over_ranks(self) -> "TaskLosses":
        """The sums over all ranks, on the CPU by one copy. Collective: every rank must call it."""
        both = torch.stack((self.loss, self.labelled_tokens))
        dist.all_reduce(both)
        return TaskLosses(*both.cpu())

    @classmethod
    def zeros(cls, num_tasks: int, device: torch.device) -> "TaskLosses":
        return cls(torch.zeros(num_tasks, device=device), torch.zeros(num_tasks, device=device))


class LabelledLoss(nn.Module):
    """A causal LM whose head sees labelled positions only. This is the module that DeepSpeed is given.

    The selection (`ChunkedLogits`) lives for one forward: generation and any other use of the model see every row.
    It happens inside this module, because ZeRO-3 traces the forward of the module that it was given.

    chunk: labelled tokens whose logits are held at once, see `loss_chunk`; 0: all.
    """

    def __init__(self, model: nn.Module, router_stats: RouterStats, num_tasks: int, chunk: int = 0) -> None:
        super().__init__()
        self.model = model
        self.router_stats = router_stats
        self.num_tasks = num_tasks
        self.logits = ChunkedLogits(model, chunk)

    def forward(self, batch: Batch, labelled_tokens: int, scale: float) -> tuple[torch.Tensor, TaskLosses]:
        """The loss to go backward from, and the sums by task for the report.

        batch: on the model's device. labelled_tokens: those of the whole global batch, by which the sum over
        this micro-batch is divided, so that accumulation and rank count change nothing. scale: undoes the averaging
        over ranks and micro-batches that DeepSpeed applies.
        """
        targets = of_labelled(batch["labels"], batch)
        losses = self.logits.cross_entropy(packed_forward(self.model, batch), batch["predicting"], targets)
        by_task = self._sum_by_task(losses.detach(), of_labelled(batch["task_ids"], batch))
        return self.router_stats.capture_loss_grad(losses.sum() / labelled_tokens) * scale, by_task

    def _sum_by_task(self, losses: torch.Tensor, tasks: torch.Tensor) -> TaskLosses:
        zeros = losses.new_zeros(self.num_tasks)
        return TaskLosses(zeros.index_add(0, tasks, losses), zeros.index_add(0, tasks, torch.ones_like(losses)))
