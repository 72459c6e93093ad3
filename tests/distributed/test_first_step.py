"""The step with zero gradients that DeepSpeed makes at initialisation in bf16 without ZeRO is taken back."""

from types import SimpleNamespace

import torch
from torch import nn

from trainer.distributed.deepspeed_internals import undo_first_step


def optimizer_after_deepspeeds_start(values: torch.Tensor) -> tuple[SimpleNamespace, torch.optim.AdamW, nn.Parameter]:
    """What FP16_UnfusedOptimizer leaves: bf16 parameters, fp32 copies, and one step of the optimizer on the copies."""
    parameter = nn.Parameter(values.bfloat16())
    copy = nn.Parameter(parameter.detach().float())
    inner = torch.optim.AdamW([copy], lr=0.1, weight_decay=0.5)
    copy.grad = torch.zeros_like(copy)
    inner.step()
    return SimpleNamespace(fp16_groups=[[parameter]], fp32_groups=[[copy]], state=inner.state), inner, copy


def test_its_state_is_kept_since_paged_memory_is_never_freed_and_steps_are_those_of_a_fresh_optimizer():
    values, gradient = torch.tensor([1.0, -2.0, 3.0]), torch.tensor([0.3, 0.1, -0.2])
    wrapper, inner, copy = optimizer_after_deepspeeds_start(values)
    moments = {name: inner.state[copy][name] for name in ("exp_avg", "exp_avg_sq")}
    undo_first_step(wrapper)
    assert torch.equal(copy, values)
    assert all(inner.state[copy][name] is moment and not moment.any() for name, moment in moments.items())
    fresh = nn.Parameter(values.clone())
    other = torch.optim.AdamW([fresh], lr=0.1, weight_decay=0.5)
    for optimizer, stepped in ((inner, copy), (other, fresh)):
        stepped.grad = gradient
        optimizer.step()
    assert torch.equal(copy, fresh)


def test_an_optimizer_that_counts_steps_in_a_plain_number_as_bitsandbytes_does_begins_at_zero():
    copy = nn.Parameter(torch.ones(2))
    state = {copy: {"step": 1, "state1": torch.zeros(2)}}
    undo_first_step(SimpleNamespace(fp16_groups=[[nn.Parameter(torch.ones(2))]], fp32_groups=[[copy]], state=state))
    assert state[copy]["step"] == 0
