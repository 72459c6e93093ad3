"""`base.attention: varlen`: torch's own flash kernels for packed documents, without a mask or the package flash-attn.

Registered with transformers 5.23 as an attention of its own. torch 2.13 has these kernels for CUDA only.
"""

from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn.attention import varlen
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_flash_attention_utils import prepare_fa_kwargs_from_position_ids

NAME = "varlen"


def register() -> None:
    """Makes `attn_implementation="varlen"` known to transformers."""
    AttentionInterface.register(NAME, varlen_attention)
    AttentionMaskInterface.register(NAME, _mask)


def varlen_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each document: [rows, seq, heads, d].

    query [rows, heads, seq, d]; key and value with as many or fewer heads. Documents are those of the lengths
    (`packed_documents.document_arguments`), else those that position_ids show, which makes the host wait for the GPU.
    With a mask (padded prompts, decoding) it is sdpa. Raises ValueError for what the kernels do not have.
    """
    if attention_mask is not None or query.shape[2] != key.shape[2]:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **options
        )
    asked = {"softcap": options.get("softcap"), "s_aux": options.get("s_aux"), "dropout": dropout or None}
    if missing := [name for name, value in asked.items() if value is not None]:
        raise ValueError(f"varlen attention has no {missing[0]}")
    starts, longest = cu_seq_lens_q, max_length_q
    if starts is None or longest is None:
        starts, longest = _find_documents(query, position_ids)
    q, k, v = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
    attended = varlen.varlen_attn(
        q, k, v, starts, starts, longest, longest,
        scale=scaling,
        window_size=(-1 if sliding_window is None else sliding_window - 1, 0),
        enable_gqa=q.shape[1] != k.shape[1],
    )  # fmt: skip
    out = cast(Tensor, attended)  # a pair only where it is asked for
    return out.unflatten(0, (query.shape[0], -1)), None


def _find_documents(query: Tensor, position_ids: Tensor | None) -> tuple[Tensor, int]:
    rows, _, length, _ = query.shape
    if position_ids is None:
        return torch.arange(0, (rows + 1) * length, length, dtype=torch.int32, device=query.device), length
    (starts, _), (longest, _) = prepare_fa_kwargs_from_position_ids(position_ids.expand(rows, -1))
    return starts, int(longest)


def _mask(**arguments: Any) -> Tensor | None:
    """sdpa's mask for padded prompts and for decoding with a cache; none where documents are whole."""
    if arguments["attention_mask"] is None and arguments["q_length"] == arguments["kv_length"]:
        return None
    return sdpa_mask(**arguments)
