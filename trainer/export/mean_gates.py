"""Constant gates: each expert's mean weight omega on calibration rows.

A gate that depends on the token cannot be folded into matrices; its mean can. trainer.export.fidelity measures what
that changes.
"""

from collections.abc import Iterable, Iterator
from functools import partial
from typing import cast

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedModel

from data_prep.reader import PreparedSet
from data_prep.user_error import UserError
from trainer.adapters.fused import gate_weights
from trainer.adapters.layer import ExpertLayer, Experts
from trainer.objective.batches import NO_TASK, Batch, collate


def calibration_rows(prepared: PreparedSet, count: int, seed: int, task: int | None) -> Iterator[Batch]:
    """At most `count` training rows, one per batch, drawn by `seed`; with `task`, only rows that contain it."""
    drawn = 0
    for index in np.random.default_rng(seed).permutation(len(prepared.train)):
        row = prepared.train[int(index)]
        if task is None or (row["task_ids"] == task).any():
            yield collate([row])
            drawn += 1
        if drawn == count:
            return


@torch.no_grad()
def mean_gates(model: PeftModel, batches: Iterable[Batch], task: int | None) -> dict[str, Tensor]:
    """Mean omega [k], fp32 on the CPU, by the adapted linear's name in the base model.

    The mean is over the real tokens of the batches, or over the tokens of `task`, all with equal weight. The forwards
    use the model's own gates. Raises UserError if there is no such token.
    """
    layers = adapted_by_experts(model)
    sums = {name: torch.zeros(len(e.experts), dtype=torch.float64, device=model.device) for name, e in layers.items()}
    decoder = cast(PreTrainedModel, model.get_base_model()).base_model  # without the head: no logits are needed
    tokens = 0
    for batch in batches:
        counted = (batch["task_ids"] != NO_TASK if task is None else batch["task_ids"] == task).flatten()
        tokens += int(counted.sum())
        add = partial(_add, counted=counted.to(model.device))
        hooks = [experts.register_forward_pre_hook(partial(add, sums[name])) for name, experts in layers.items()]
        try:
            ids, positions = (batch[key].to(model.device) for key in ("input_ids", "position_ids"))
            decoder(input_ids=ids, position_ids=positions, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not tokens:
        raise UserError(
            "--task: the training split has no token of this task to average the gates over; leave --task out"
        )
    return {name: (total / tokens).float().cpu() for name, total in sums.items()}


def adapted_by_experts(model: PeftModel) -> dict[str, Experts]:
    """The experts of each adapted linear, by the linear's name in the base model; {} for a plain LoRA."""
    modules = model.get_base_model().named_modules()
    return {name: cast(Experts, m.adapters[m.active_adapters[0]]) for name, m in modules if isinstance(m, ExpertLayer)}


def _add(into: Tensor, experts: Experts, inputs: tuple[Tensor, Tensor], counted: Tensor) -> None:
    """Adds the omega of the counted tokens in one forward of `experts`. counted: bool [tokens]."""
    _, omega = gate_weights(inputs[0], experts.router, experts.interaction, experts.gate)
    into += omega[:, counted].sum(1, dtype=into.dtype)
