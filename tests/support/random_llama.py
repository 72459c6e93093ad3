"""A base of a given size with random weights."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
LLAMA_8B = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 8192,
}
FILES = 4
NOISE = 16_777_213  # a prime: rows of repeated noise do not begin alike


def build_model(folder: Path, sizes: Mapping[str, Any] = SIZES) -> int:
    """Writes a random bf16 Llama of several safetensors files; returns the bytes of its tensors.

    All weights repeat the same noise, since billions of random numbers take minutes on a CPU. Norms are ones.
    """
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(**sizes, tie_word_embeddings=False)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    noise = (torch.randn(min(NOISE, max(shape.numel() for shape in shapes.values()))) * 0.02).bfloat16()
    where = {name: f"model-{index % FILES + 1:05}-of-{FILES:05}.safetensors" for index, name in enumerate(shapes)}
    for file in sorted(set(where.values())):
        tensors = {name: _weight(shapes[name], noise) for name in shapes if where[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size


def _weight(shape: torch.Size, noise: Tensor) -> Tensor:
    if len(shape) == 1:
        return torch.ones(shape, dtype=torch.bfloat16)
    return noise.repeat(-(-shape.numel() // len(noise)))[: shape.numel()].view(shape)
