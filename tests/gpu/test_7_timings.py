"""Figures for decisions: what rows of an odd length cost, DeepSpeed's timer, and the adapter over a plain LoRA."""

import json
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn

from trainer.adapters import TeamLoraConfig
from trainer.adapters.layer import Experts
from trainer.base.nf4 import NF4Linear

D_IN, D_OUT, RANK = 4096, 14336, 64


def milliseconds(action: Callable[[], object]) -> float:
    """Median of the GPU's time."""
    taken = []
    for _ in range(30):
        started, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        started.record()
        action()
        ended.record()
        ended.synchronize()
        taken.append(started.elapsed_time(ended))
    return statistics.median(taken[10:])


def forward_and_backward(module: nn.Module, tokens: int) -> float:
    x = torch.randn(tokens, D_IN, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    y = torch.randn(tokens, D_OUT, device="cuda", dtype=torch.bfloat16)
    return milliseconds(lambda: (y + module(x)).sum().backward())


class Lora(nn.Module):
    """A plain LoRA's branch of the same total rank."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Linear(D_IN, RANK, bias=False), nn.Linear(RANK, D_OUT, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.b(self.a(x))


class TeamLora(nn.Module):
    """The adapter's branch, on an output of zeros."""

    def __init__(self) -> None:
        super().__init__()
        config = TeamLoraConfig(num_experts=4, expert_rank=RANK // 4, alpha=16, init_weights=False)
        self.experts = Experts(D_IN, D_OUT, config)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.experts(x, x.new_zeros(*x.shape[:-1], D_OUT))


def test_the_adapter_over_a_plain_lora_of_the_same_rank(figures):
    ours, plain = TeamLora().cuda().bfloat16(), Lora().cuda().bfloat16()
    ratio = forward_and_backward(ours, 4096) / forward_and_backward(plain, 4096)
    figures["adapter over LoRA, 4096 tokens"] = round(ratio, 3)
    assert ratio <= 1.05


def test_rows_of_a_length_that_is_no_multiple_of_eight(figures):
    ours = TeamLora().cuda().bfloat16()
    figures["4061 tokens over 4064"] = round(forward_and_backward(ours, 4061) / forward_and_backward(ours, 4064), 3)


@pytest.mark.parametrize("rows", [1, 8, 32, 512])
@torch.inference_mode()
def test_a_frozen_linear_for_so_many_rows(figures, rows):
    """As decoding calls it, over the product with the weight once dequantised."""
    linear = nn.Linear(D_IN, D_OUT, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = NF4Linear.from_linear(linear, torch.bfloat16)
    x, weight = torch.randn(rows, D_IN, device="cuda", dtype=torch.bfloat16), layer.dequantized(torch.bfloat16)
    ratio = milliseconds(lambda: layer(x)) / milliseconds(lambda: nn.functional.linear(x, weight))
    figures[f"NF4 linear over bf16, {rows} rows"] = round(ratio, 2)


@pytest.mark.parametrize("enabled", [True, False])
def test_deepspeeds_timer(eight_layers, figures, enabled):
    path = eight_layers.workplace.folder / f"timer-{enabled}.json"
    timers = {"throughput": {"enabled": enabled}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "timers": timers}))
    records = eight_layers.train(f"timer-{enabled}", f"deepspeed.config={path}", "train.activation_checkpointing=false")
    speed = statistics.median(record["tokens_per_second"] for record in records[5:])
    figures[f"tokens per second, DeepSpeed's timer {'on' if enabled else 'off'}"] = round(speed)
