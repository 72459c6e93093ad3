"""Loading a base: against from_pretrained, and against transformers' model with weights rounded to NF4."""

import pytest
import torch
from safetensors.torch import save_file
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from data_prep.user_error import UserError
from tests.support.tiny_models import FAMILIES, SIZES, tiny_llama, tiny_model
from trainer.base.base_fingerprint import fingerprint
from trainer.base.loader import load_base
from trainer.base.nf4 import NF4Linear
from trainer.base.weight_map import skeleton

TOKENS = torch.arange(3, 27).view(2, 12)


def logits(model, **inputs) -> torch.Tensor:
    with torch.no_grad():
        return model(**{"input_ids": TOKENS, "use_cache": False, **inputs}).logits


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_unquantised_fp32_equals_from_pretrained_exactly(tmp_path, base_of, family, tie):
    folder = tiny_model(tmp_path, family, tie=tie)
    ours = load_base(base_of(folder, attention="eager"), "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    expected = dict(theirs.named_parameters())
    assert dict(ours.named_parameters()).keys() == expected.keys()
    assert all(torch.equal(p, expected[name]) for name, p in ours.named_parameters())
    assert torch.equal(logits(ours), logits(theirs))


@pytest.mark.parametrize("family", FAMILIES)
def test_nf4_equals_the_transformers_model_with_dequantised_weights(tmp_path, base_of, family):
    folder = tiny_model(tmp_path, family, tie=family in ("llama", "gemma2"))
    ours = load_base(base_of(folder, quantization="nf4", attention="eager"), "cpu")
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    packed = {name: m for name, m in ours.named_modules() if isinstance(m, NF4Linear)}
    with torch.no_grad():
        for name, module in packed.items():
            theirs.get_submodule(name).weight.copy_(module.dequantized(torch.float32))
    linears = {n for n, m in theirs.named_modules() if isinstance(m, torch.nn.Linear)}
    assert linears - packed.keys() == {"lm_head"}
    assert (logits(ours) - logits(theirs)).abs().max() <= 1e-5 * logits(theirs).abs().max()


@pytest.mark.parametrize("tie", [False, True], ids=["untied", "tied"])
def test_tied_heads_stay_one_parameter_and_untied_ones_two(tmp_path, base_of, tie):
    model = load_base(base_of(tiny_llama(tmp_path, tie=tie), quantization="nf4"), "cpu")
    assert (model.lm_head.weight is model.model.embed_tokens.weight) == tie


def test_nothing_learns_and_nothing_stays_on_meta(tmp_path, base_of):
    model = load_base(base_of(tiny_model(tmp_path, "qwen2"), quantization="nf4", dtype="bf16"), "cpu")
    assert not model.training
    assert not any(p.requires_grad for p in model.parameters())
    assert not any(t.is_meta for t in [*model.parameters(), *model.buffers()])


def test_what_is_not_quantised_is_stored_in_the_compute_dtype(tmp_path, base_of):
    folder = tiny_model(tmp_path, "qwen2", dtype=torch.float32)
    model = load_base(base_of(folder, quantization="nf4", dtype="bf16"), "cpu")
    assert {p.dtype for n, p in model.named_parameters() if "_proj.weight" not in n and "absmax" not in n} == {
        torch.bfloat16
    }
    assert logits(model).dtype == torch.bfloat16


def test_one_file_and_many_files_give_the_same_model(tmp_path, base_of):
    one = load_base(base_of(tiny_llama(tmp_path / "one"), quantization="nf4"), "cpu")
    many_folder = tiny_llama(tmp_path / "many", max_shard_size="50KB")
    assert len(list(many_folder.glob("*.safetensors"))) > 2
    assert torch.equal(logits(one), logits(load_base(base_of(many_folder, quantization="nf4"), "cpu")))


def test_weights_that_lie_there_in_another_form_too_are_left_alone(tmp_path, base_of):
    folder = tiny_llama(tmp_path, max_shard_size="50KB")
    base = base_of(folder, quantization="nf4")
    expected, before = logits(load_base(base, "cpu")), fingerprint(folder)
    save_file({"norm.weight": torch.zeros(64)}, folder / "consolidated.safetensors")
    assert torch.equal(logits(load_base(base, "cpu")), expected)
    assert fingerprint(folder) == before
    (folder / "model.safetensors.index.json").write_text("{}")
    with pytest.raises(
        UserError, match=r"index\.json: not readable as an index \('weight_map'\); fetch the model again"
    ):
        load_base(base, "cpu")


def test_a_base_is_known_to_others_by_the_name_that_the_recipe_gives(base_of):
    model = skeleton(CONFIG_MAPPING["llama"](**SIZES, name_or_path="cache/of/this/machine"), base_of("org/model"))
    assert (model.name_or_path, model.config.name_or_path) == ("org/model", "org/model")


def test_weights_saved_without_the_models_prefix_find_their_place(tmp_path, base_of):
    full = AutoModelForCausalLM.from_pretrained(tiny_llama(tmp_path / "full", tie=True), dtype=torch.float32)
    full.save_pretrained(tmp_path / "full")
    full.model.save_pretrained(tmp_path / "inner")
    full.config.save_pretrained(tmp_path / "inner")
    assert torch.equal(logits(load_base(base_of(tmp_path / "inner"), "cpu")), logits(full))


def test_generation_uses_its_cache_while_a_plain_forward_does_not(tmp_path, base_of):
    model = load_base(base_of(tiny_llama(tmp_path), quantization="nf4"), "cpu")
    assert model(input_ids=TOKENS).past_key_values is None
    cached = model.generate(TOKENS, max_new_tokens=5, do_sample=False, return_dict_in_generate=True)
    assert cached.past_key_values is not None
    for step in range(5):
        seen = cached.sequences[:, : 12 + step]
        assert torch.equal(logits(model, input_ids=seen)[:, -1].argmax(-1), cached.sequences[:, 12 + step])


@pytest.mark.slow
def test_sample_base_in_nf4_answers_and_reads_like_itself(tmp_path, base_of):
    from trainer.base.model_config import load_tokenizer
    from trainer.base.sample import sample_base

    folder = sample_base(tmp_path / "sample")
    base = base_of(folder, quantization="nf4", dtype="bf16")
    model, tokenizer = load_base(base, "cpu"), load_tokenizer(base)
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")
    answer = model.generate(**prompt, max_new_tokens=12, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "Paris" in tokenizer.decode(answer)
    assert tokenizer("12 cats").keys() == {"input_ids", "attention_mask"}
    assert tokenizer.tokenize("1234") == ["1", "2", "3", "4"]
    again = folder.stat().st_mtime_ns
    assert sample_base(folder).stat().st_mtime_ns == again
