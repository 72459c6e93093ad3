"""A base of a given size with random weights."""

import json
from pathlib import Path

import torch
from accelerate import init_empty_weights
from safetensors.torch import save_file
from transformers import LlamaConfig, LlamaForCausalLM

SIZES = {
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_hidden_layers": 16,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 32000,
}
FILES = 4


def build_model(folder: Path, layers: int = SIZES["num_hidden_layers"]) -> int:
    """Writes a random bf16 Llama of several safetensors files; returns the bytes of its tensors."""
    folder.mkdir(exist_ok=True)
    config = LlamaConfig(**{**SIZES, "num_hidden_layers": layers}, tie_word_embeddings=False)
    with init_empty_weights():
        shapes = {name: p.shape for name, p in LlamaForCausalLM(config).named_parameters()}
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    where = {name: f"model-{index % FILES + 1:05}-of-{FILES:05}.safetensors" for index, name in enumerate(shapes)}
    for file in sorted(set(where.values())):
        tensors = {name: (torch.randn(shapes[name]) * 0.02).bfloat16() for name in shapes if where[name] == file}
        save_file(tensors, folder / file, metadata={"format": "pt"})
    size = sum(2 * shape.numel() for shape in shapes.values())
    index = {"metadata": {"total_size": size}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return size
