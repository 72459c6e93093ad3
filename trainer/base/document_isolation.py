"""Checks that an architecture keeps packed documents apart, by trying it on a tiny copy of itself.

transformers isolates documents where position_ids restart, if the model hands position_ids to its mask, no
attention_mask is given and no cache is in use. Models with ALiBi, learned positions counted from the mask, or
a recurrent state do not. No list says which do, so it is tried: changing one document must not change the other's
logits.
"""

import copy
from functools import partial
from typing import cast

import torch
from torch import nn
from transformers import AutoModelForCausalLM, PretrainedConfig, PreTrainedModel

from data_prep.user_error import UserError
from trainer.base.model_folder import one_line
from trainer.base.packed_documents import document_arguments
from trainer.recipe import TAKE_LENGTHS

# Small enough for milliseconds; head_dim 16 divides into rotary halves and quarters.
TINY = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 64,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
DOCUMENTS = (5, 8)
# A leak moves logits by 1e-3 and more. Isolated ones differ by nothing, or by a matmul's order of summation.
TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2}


def check_document_isolation(config: PretrainedConfig, attention: str, trust_remote_code: bool) -> None:
    """Raise UserError unless packed documents are isolated in this architecture with this attention.

    Leaves the random state as it was. flash_attention_2 and varlen are tried on the GPU and in bf16.
    """
    on_gpu = attention in TAKE_LENGTHS
    device, dtype = torch.device("cuda" if on_gpu else "cpu"), torch.bfloat16 if on_gpu else torch.float32
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        torch.manual_seed(0)
        try:
            model = AutoModelForCausalLM.from_config(
                tiny_config(config),
                dtype=dtype,
                attn_implementation=attention,
                trust_remote_code=trust_remote_code,
            )
            leak = _leak(model.eval().to(device), attention)
        except Exception as error:
            raise UserError(
                f"base.model: could not check whether {config.model_type} keeps packed documents apart "
                f"with base.attention={attention} ({one_line(error)}); "
                "set another attention or another model"
            ) from error
    if not leak <= TOLERANCE[dtype]:
        raise UserError(
            f"base.model: {config.model_type} with base.attention={attention} lets packed documents see one "
            "another (a change in one moved the other's logits); set another attention or another model"
        )


def check_positions(config: PretrainedConfig, seq_len: int) -> None:
    """Raises UserError where rotary frequencies would depend on the longest document of a micro-batch, or its padding.

    So they do with transformers' "longrope" and "dynamic" scaling once a position lies beyond the original length.
    """
    rope = getattr(config, "rope_parameters", None) or {}
    for each in [rope, *(value for value in rope.values() if isinstance(value, dict))]:
        kind = each.get("rope_type", "default")
        original = each.get("original_max_position_embeddings") or config.max_position_embeddings
        if (kind == "longrope" or "dynamic" in kind) and seq_len > original:
            raise UserError(
                f"data.seq_len={seq_len}: {config.model_type} ({kind}) changes the positions of all documents of a "
                f"micro-batch where one is longer than {original} tokens, so they would see one another; set "
                f"data.seq_len={original} or less"
            )


def tiny_config(config: PretrainedConfig) -> PretrainedConfig:
    """A copy of the configuration with the same kinds of layers, a few of them, and small sizes."""
    tiny = copy.deepcopy(config)
    for key, value in TINY.items():
        if getattr(tiny, key, None) is not None:
            _try_to_set(tiny, key, value)
    kinds = list(dict.fromkeys(getattr(config, "layer_types", None) or []))
    if kinds:
        _try_to_set(tiny, "layer_types", kinds)
    layers = getattr(config, "num_hidden_layers", 2)
    _try_to_set(tiny, "num_hidden_layers", len(kinds) or min(layers, 2))
    _plain_rope(tiny)
    return tiny


def _plain_rope(config: PretrainedConfig) -> None:
    """Drop long-context scaling, whose tables have the real head's length; `check_positions` looks at it."""
    rope = getattr(config, "rope_parameters", None)
    if not rope or "rope_type" not in rope:
        return
    kept = ("rope_theta", "partial_rotary_factor")
    config.rope_parameters = {"rope_type": "default", **{k: rope[k] for k in kept if k in rope}}


def _try_to_set(config: PretrainedConfig, key: str, value: object) -> None:
    # Some configurations compute a key from others; the trial itself then shows whether the rest suffices.
    try:
        setattr(config, key, value)
    except (AttributeError, NotImplementedError):
        return


def _leak(model: PreTrainedModel, attention: str) -> float:
    """Largest change in the logits of the second document of two rows when the first document's tokens change."""
    first, second = DOCUMENTS
    length = first + second
    vocabulary = cast(nn.Embedding, model.get_input_embeddings()).num_embeddings
    ids = torch.randint(1, vocabulary, (2, length), device=model.device)
    others = ids.clone()
    others[:, :first] = (ids[:, :first] + 7) % (vocabulary - 1) + 1
    positions = torch.tensor([[*range(first), *range(second)]] * 2, device=model.device)
    starts = torch.tensor([0, first, length, length + first, 2 * length], dtype=torch.int32, device=model.device)
    documents = document_arguments(attention, starts, max(DOCUMENTS))
    forward = partial(model, position_ids=positions, use_cache=False, **documents)
    logits = [forward(input_ids=x).logits for x in (ids, others)]
    return (logits[0] - logits[1])[:, first:].float().abs().max().item()
