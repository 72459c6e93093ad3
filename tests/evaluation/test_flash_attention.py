"""Evaluation passes no lengths of documents: its rows are one text each, padded, and flash attention needs none.

flash-attn's functions are loops over rows here, since only a GPU has its kernels; what calls them is transformers' own.
"""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM
from transformers import modeling_flash_attention_utils as flash

from tests.support.tiny_models import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.base import varlen_attention
from trainer.evaluation.generation import generate_greedy
from trainer.evaluation.likelihood import Continuation, log_likelihoods

LENGTHS = (9, 4, 7)
calls: list[str] = []


def attend(q: Tensor, k: Tensor, v: Tensor, causal: bool, scale: float | None) -> Tensor:
    """[seq, heads, d]; the last query sees all keys."""
    seen = torch.ones(len(q), len(k), dtype=torch.bool).tril(len(k) - len(q)) if causal else None
    states = (s.transpose(0, 1) for s in (q, k, v))
    return F.scaled_dot_product_attention(*states, seen, scale=scale, enable_gqa=True).transpose(0, 1)


def whole_rows(q, k, v, causal, softmax_scale=None, **_):
    calls.append("whole rows")
    return torch.stack([attend(*row, causal, softmax_scale) for row in zip(q, k, v, strict=True)])


def by_lengths(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale=None, **_):
    calls.append("lengths")
    parts = zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True)
    return torch.cat([attend(q[a:b], k[c:d], v[c:d], causal, softmax_scale) for (a, b), (c, d) in parts])


def torchs_varlen(q, k, v, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa):
    assert longest == longest_k and window_size == (-1, 0)
    return by_lengths(q, k, v, starts, starts_k, True, scale)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base"))


@pytest.fixture(params=["flash_attention_2", "varlen"])
def models(request, base, monkeypatch):
    """The same model with sdpa and with the other; calls of the other's kernels are noted."""
    functions = (whole_rows, by_lengths, None, flash._pad_input, flash._unpad_input)

    def options(is_causal, softmax_scale=None, **_):
        return {"causal": is_causal, "softmax_scale": softmax_scale}

    monkeypatch.setattr(flash, "lazy_import_flash_attention", lambda *_: (functions, (options, None)))
    monkeypatch.setattr(varlen, "varlen_attn", torchs_varlen)
    varlen_attention.register()
    calls.clear()
    sdpa, other = (AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval() for _ in range(2))
    other.config._attn_implementation = request.param  # after loading, which asks for the package
    return sdpa, other


def texts(count: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(3, 300, (n,), generator=generator).tolist() for n in LENGTHS[:count]]


@pytest.mark.parametrize("count", [1, 3])
def test_likelihoods_are_those_of_sdpa(models, count):
    scored = [Continuation(ids, 2) for ids in texts(count)]
    sdpa, other = (log_likelihoods(model, scored, pad=0) for model in models)
    assert other == pytest.approx(sdpa, rel=1e-5)
    assert calls


@pytest.mark.parametrize("count", [1, 3])
def test_answers_are_those_of_sdpa(models, count):
    sdpa, other = (generate_greedy(model, tiny_tokenizer(), texts(count), 8) for model in models)
    assert other == sdpa
    assert models[1].config._attn_implementation == "varlen" or calls
