"""What one optimizer step reports."""

from dataclasses import dataclass

from trainer.adapters.router_stats import RouterReport
from trainer.objective.loss import TaskLosses


@dataclass(frozen=True)
class StepReport:
    """One optimizer step over the global batch.

    losses: sums by task. learning_rate: the step's. grad_norm: before clipping. tokens: real ones, labelled ones
    included. seconds: wall time. router: None where the routers were not measured.
    """

    step: int
    losses: TaskLosses
    learning_rate: float
    grad_norm: float
    labelled_tokens: int
    tokens: int
    seconds: float
    router: RouterReport | None
