"""Gates that depend on no token: each expert's mean weight omega on calibration rows.

A gate that depends on the token cannot be folded into matrices; its mean can. What that changes is
measured by trainer.export.fidelity.
"""

from collections.abc import Iterable, Iterator
from functools import partial

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor

from data_prep.reader import PreparedSet
from data_prep.user_error import UserError
from trainer.adapters.fused import gate_weights
from trainer.adapters.layer import ExpertLayer, Experts
from trainer.objective.batches import NO_TASK, Batch, collate


def calibration_rows(prepared: PreparedSet, count: int, seed: int, task: int | None) -> Iterator[Batch]:
    """At most `count` rows of the training split, one a batch, drawn by `seed`; with `task`, only rows that hold it."""
    found = 0
    for index in np.random.default_rng(seed).permutation(len(prepared.train)):
        row = prepared.train[int(index)]
        if task is None or (row["task_ids"] == task).any():
            yield collate([row])
            found += 1
        if found == count:
            return


@torch.no_grad()
def mean_gates(model: PeftModel, batches: Iterable[Batch], task: int | None) -> dict[str, Tensor]:
    """Mean omega [k], fp32 on the CPU, by the adapted linear's name in the base model.

    Over the real tokens of the batches, with `task` over those of that task alone: every token counts the same. The
    model's own gates are at work meanwhile. Raises UserError where there is no such token.
    """
    layers = adapted_by_experts(model)
    sums = {name: torch.zeros(len(e.experts), dtype=torch.float64, device=model.device) for name, e in layers.items()}
    tokens = 0
    for batch in batches:
        counted = (batch["task_ids"] != NO_TASK if task is None else batch["task_ids"] == task).flatten()
        tokens += int(counted.sum())
        add = partial(_add, counted=counted.to(model.device))
        hooks = [experts.register_forward_pre_hook(partial(add, sums[name])) for name, experts in layers.items()]
        try:
            # the decoder alone: nobody looks at logits
            decoder = model.get_base_model().base_model
            ids, positions = (batch[key].to(model.device) for key in ("input_ids", "position_ids"))
            decoder(input_ids=ids, position_ids=positions, use_cache=False)
        finally:
            for hook in hooks:
                hook.remove()
    if not tokens:
        raise UserError("--task: the training split has no token of it to take the gates' mean over; leave --task out")
    return {name: (total / tokens).float().cpu() for name, total in sums.items()}


def adapted_by_experts(model: PeftModel) -> dict[str, Experts]:
    """The experts on each adapted linear, by the linear's name in the base model; none in a plain LoRA."""
    modules = model.get_base_model().named_modules()
    return {name: m.adapters[m.active_adapters[0]] for name, m in modules if isinstance(m, ExpertLayer)}


def _add(into: Tensor, experts: Experts, inputs: tuple[Tensor, Tensor], counted: Tensor) -> None:
    """Adds the omega of the tokens that count, in one forward of `experts`; counted: bool [tokens]."""
    _, omega = gate_weights(inputs[0], experts.router, experts.interaction, experts.gate)
    into += omega[:, counted].sum(1, dtype=into.dtype)
