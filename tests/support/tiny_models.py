"""Random models of many families, well under a megabyte, saved as ordinary transformers folders."""

from pathlib import Path

import torch
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 512,
    "max_position_embeddings": 512,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# What each family brings that others do not.
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": 6},
    "qwen2": {},  # biases on q, k and v
    "qwen3": {},  # norms on q and k
    "gemma2": {"attn_logit_softcapping": 50.0, "final_logit_softcapping": 30.0},
    "gemma3_text": {"sliding_window": 6, "layer_types": ["sliding_attention", "full_attention"]},
    "phi3": {},  # fused q/k/v and gate/up
    "olmo2": {},  # norms after the sublayers
    "granite": {"logits_scaling": 4.0},
}


def tiny_model(
    folder: Path,
    family: str = "llama",
    *,
    tie: bool = False,
    dtype: torch.dtype = torch.bfloat16,
    seed: int = 0,
    max_shard_size: str = "5GB",
    **sizes: object,
) -> Path:
    """Save a random causal LM of `family` into `folder` and return the folder.

    `sizes` override the configuration's keys. Weights are drawn wide (std 0.2): logits differ clearly.
    """
    keys = {**SIZES, **FAMILIES.get(family, {}), **sizes}
    config = CONFIG_MAPPING[family](tie_word_embeddings=tie, **keys)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.add_(torch.randn_like(parameter) * 0.2)
    model.to(dtype).save_pretrained(folder, max_shard_size=max_shard_size)
    return Path(folder)


def tiny_llama(folder: Path, **options: object) -> Path:
    """`tiny_model` of the family that most tests need."""
    return tiny_model(folder, "llama", **options)
