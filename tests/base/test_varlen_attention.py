"""base.attention varlen, with a loop over documents in place of torch's kernels, which only a GPU has."""

from itertools import pairwise

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import varlen
from transformers import AutoModelForCausalLM
from transformers.masking_utils import create_causal_mask

from data_prep.user_error import UserError
from tests.support import scene
from tests.support.tiny_models import tiny_llama, tiny_model
from trainer.base import varlen_attention
from trainer.base.document_isolation import check_document_isolation
from trainer.base.loader import load_base
from trainer.base.model_config import parse_config
from trainer.base.packed_documents import document_arguments
from trainer.objective.batches import collate


def loop_over_documents(query, key, value, starts, starts_k, longest, longest_k, *, scale, window_size, enable_gqa):
    """torch.nn.attention.varlen.varlen_attn in plain operations, [tokens, heads, d]."""
    assert starts is starts_k and longest == longest_k == max(int(b - a) for a, b in pairwise(starts))
    window, right = window_size
    assert right == 0
    outputs = []
    for start, end in pairwise(starts.tolist()):
        q, k, v = (states[start:end].transpose(0, 1) for states in (query, key, value))
        distance = torch.arange(end - start)[:, None] - torch.arange(end - start)
        seen = (distance >= 0) & ((distance <= window) if window >= 0 else True)
        out = F.scaled_dot_product_attention(q, k, v, seen, scale=scale, enable_gqa=enable_gqa)
        outputs.append(out.transpose(0, 1))
    return torch.cat(outputs)


@pytest.fixture(autouse=True)
def kernels(monkeypatch):
    monkeypatch.setattr(varlen, "varlen_attn", loop_over_documents)
    varlen_attention.register()


@pytest.fixture(params=["llama", "mistral", "qwen3", "gemma3_text"])
def models(request, tmp_path):
    """The same model with sdpa and with varlen; two have sliding windows of 6 tokens."""
    folder = tiny_model(tmp_path, request.param)
    kinds = ("sdpa", "varlen")
    return [AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation=k) for k in kinds]


def forward(model, batch, **arguments) -> Tensor:
    with torch.no_grad():
        ids, positions = batch["input_ids"], batch["position_ids"]
        return model(input_ids=ids, position_ids=positions, use_cache=False, **arguments).logits


def batch_of_rows():
    """Three rows of unequal length, of two documents each, two of them padded."""
    return collate(scene.rows(3, seed=4))


def test_logits_equal_those_of_sdpa_with_and_without_the_lengths(models):
    batch, (sdpa, ours) = batch_of_rows(), models
    expected = forward(sdpa, batch)
    lengths = document_arguments("varlen", batch["document_starts"], batch["longest_document"])
    for arguments in (lengths, {}):
        assert torch.allclose(forward(ours, batch, **arguments), expected, atol=1e-4)


def test_answers_equal_those_of_sdpa(models):
    ids = torch.randint(3, 300, (2, 9), generator=torch.Generator().manual_seed(0))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    answers = [m.generate(ids, attention_mask=mask, max_new_tokens=8, do_sample=False) for m in models]
    assert torch.equal(*answers)


def test_passed_lengths_are_the_documents_of_the_mask_that_sdpa_uses(tmp_path):
    batch = batch_of_rows()
    config = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path), attn_implementation="sdpa").config
    rows, length = batch["input_ids"].shape
    hidden = torch.zeros(rows, length, config.hidden_size)
    mask = create_causal_mask(config, hidden, None, None, position_ids=batch["position_ids"])
    seen = torch.zeros(rows * length, rows * length, dtype=torch.bool)
    for start, end in pairwise(batch["document_starts"].tolist()):
        seen[start:end, start:end] = torch.ones(end - start, end - start, dtype=torch.bool).tril()
    for row in range(rows):
        own = slice(row * length, (row + 1) * length)
        assert torch.equal(seen[own, own], mask[row, 0])
        seen[own, own] = False
    assert not seen.any()  # no document reaches into another row


def test_only_kinds_that_take_lengths_get_them():
    starts = torch.tensor([0, 3], dtype=torch.int32)
    assert document_arguments("sdpa", starts, 3) == document_arguments("eager", starts, 3) == {}
    given = document_arguments("flash_attention_2", starts, 3)
    assert given == {"cu_seq_lens_q": starts, "cu_seq_lens_k": starts, "max_length_q": 3, "max_length_k": 3}


def test_transformers_hands_given_lengths_of_several_rows_to_flash_attention(monkeypatch):
    """What `micro_batch_size` above 1 with flash_attention_2 rests on, in transformers' own code."""
    from transformers import modeling_flash_attention_utils as flash

    calls = []

    def kernel(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, **_options):
        calls.append((q.shape, cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), max_seqlen_q, max_seqlen_k))
        return q

    def process(max_seqlen_q, max_seqlen_k, **_options):
        return {"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k}

    monkeypatch.setattr(
        flash, "lazy_import_flash_attention", lambda *_: ((None, kernel, None, None, None), (process, None))
    )
    batch = batch_of_rows()
    rows, length = batch["input_ids"].shape
    states = torch.randn(rows, length, 4, 16)
    lengths = document_arguments("flash_attention_2", batch["document_starts"], batch["longest_document"])
    out = flash._flash_attention_forward(
        states, states, states, None, length, is_causal=True, position_ids=batch["position_ids"], **lengths
    )
    starts = batch["document_starts"].tolist()
    longest = batch["longest_document"]
    assert torch.equal(out, states)
    assert calls == [((rows * length, 4, 16), starts, starts, longest, longest)]


@pytest.mark.skipif(torch.cuda.is_available(), reason="refused without a GPU")
def test_varlen_without_a_gpu_is_refused(tmp_path, base_of):
    base = base_of(tiny_llama(tmp_path), attention="varlen", dtype="bf16")
    with pytest.raises(UserError, match=r"^base\.attention=varlen: needs a GPU, and this machine has none; use sdpa$"):
        parse_config(base)


def test_attention_dropout_is_refused(tmp_path, base_of, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    base = base_of(tiny_llama(tmp_path, attention_dropout=0.1), attention="varlen", dtype="bf16")
    with pytest.raises(UserError, match=r"varlen has no dropout, and llama trains with attention_dropout=0\.1; set"):
        parse_config(base)


def test_soft_capping_is_refused(tmp_path, base_of, monkeypatch):
    monkeypatch.setattr("trainer.base.document_isolation.TAKE_LENGTHS", ())  # tries it on the CPU
    config = load_base(base_of(tiny_model(tmp_path, "gemma2"), attention="eager"), "cpu").config
    with pytest.raises(UserError, match=r"base\.attention=varlen \(varlen attention has no softcap\); set another"):
        check_document_isolation(config, "varlen", trust_remote_code=False)
