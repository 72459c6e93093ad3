"""Figures for decisions: what rows of an odd length cost, DeepSpeed's timer, and the adapter over a plain LoRA."""

import json
import statistics
from collections.abc import Callable

import pytest
import torch
from torch import nn

from tests.support.adapted_layer import Cell
from tests.support.timing import median_seconds
from trainer.base.nf4 import NF4Linear

D_IN, D_OUT, RANK = 4096, 14336, 64


def seconds(action: Callable[[], object]) -> float:
    return median_seconds(action, torch.device("cuda"))


def step_seconds(variant: str, tokens: int) -> float:
    """Of forward and backward."""
    layer = Cell(D_IN, D_OUT, RANK, "bf16").build(tokens, "cuda")
    return seconds(lambda: layer.step(variant))


def test_the_adapter_over_a_plain_lora_of_the_same_rank(figures):
    ratio = step_seconds("teamlora", 4096) / step_seconds("lora", 4096)
    figures["adapter over LoRA, 4096 tokens"] = round(ratio, 3)
    assert ratio <= 1.05


def test_rows_of_a_length_that_is_no_multiple_of_eight(figures):
    figures["4061 tokens over 4064"] = round(step_seconds("teamlora", 4061) / step_seconds("teamlora", 4064), 3)


@pytest.mark.parametrize("rows", [1, 8, 32, 512])
@torch.inference_mode()
def test_a_frozen_linear_for_so_many_rows(figures, rows):
    """As decoding calls it, over the product with the weight once dequantised."""
    linear = nn.Linear(D_IN, D_OUT, bias=False, device="cuda", dtype=torch.bfloat16)
    layer = NF4Linear.from_linear(linear, torch.bfloat16)
    x, weight = torch.randn(rows, D_IN, device="cuda", dtype=torch.bfloat16), layer.dequantized(torch.bfloat16)
    ratio = seconds(lambda: layer(x)) / seconds(lambda: nn.functional.linear(x, weight))
    figures[f"NF4 linear over bf16, {rows} rows"] = round(ratio, 2)


@pytest.mark.parametrize("enabled", [True, False])
def test_deepspeeds_timer(eight_layers, figures, enabled):
    path = eight_layers.workplace.folder / f"timer-{enabled}.json"
    timers = {"throughput": {"enabled": enabled}}
    path.write_text(json.dumps({"zero_optimization": {"stage": 0}, "timers": timers}))
    records = eight_layers.train(f"timer-{enabled}", f"deepspeed.config={path}", "train.activation_checkpointing=false")
    speed = statistics.median(record["tokens_per_second"] for record in records[5:])
    figures[f"tokens per second, DeepSpeed's timer {'on' if enabled else 'off'}"] = round(speed)
