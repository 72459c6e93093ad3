"""Floating-point operations that training an adapter needs at least, and what the device manages in one product."""

from collections.abc import Mapping
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig

from tests.support.timing import median_seconds


def training_flops(config: PretrainedConfig, trained: int, seq_len: int) -> int:
    """Per token of rows that are one document each. trained: elements of the adapter.

    A product with a frozen weight takes 2 operations per element forward, and 2 backward for the gradient of its input;
    with a trained one 2 more. Attention's two products see half of the row on average, and have twice as many
    backward. Not counted: what checkpointing computes again, dequantisation, norms, the optimizer.
    """
    return 2 * weight_flops(config) + 3 * attention_flops(config, seq_len) + 6 * trained


def weight_flops(config: PretrainedConfig) -> int:
    """Of one token's products with all linears, the head included, forward."""
    with init_empty_weights():
        model = AutoModelForCausalLM.from_config(config)
    return sum(2 * m.weight.numel() for m in model.modules() if isinstance(m, nn.Linear))


def attention_flops(config: PretrainedConfig, seq_len: int) -> int:
    """Of one token's attention to the tokens before it, forward, in the mean over a row."""
    return 2 * seq_len * config.num_attention_heads * config.head_dim * config.num_hidden_layers


def matmul_flops_per_second(sizes: Mapping[str, Any], device: torch.device) -> float:
    """Of a bf16 product of square matrices, twice as wide as the model's hidden states."""
    n = 2 * sizes["hidden_size"]
    left, right = (torch.randn(n, n, device=device, dtype=torch.bfloat16) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: left @ right, device)
