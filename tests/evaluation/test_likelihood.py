"""Likelihoods in batches against a loop over tokens, and what of a text is scored."""

import pytest
import torch

from data_prep.chat import ChatTemplate
from trainer.evaluation.generation import prompt_text
from trainer.evaluation.likelihood import encode_choices, log_likelihoods, reference_answers


@torch.no_grad()
def by_token(run, ids: list[int], start: int) -> float:
    total = 0.0
    for at in range(start, len(ids)):
        logits = run.model(input_ids=torch.tensor([ids[:at]]), use_cache=False).logits[0, -1]
        total += torch.log_softmax(logits.double(), 0)[ids[at]].item()
    return total


@pytest.mark.parametrize("size", [1, 4, 57])
def test_choices_and_answers_are_as_likely_as_token_by_token(run, items, size):
    template = ChatTemplate(run.tokenizer)
    texts = [text for item in items[:6] for text in encode_choices(item, run.tokenizer, template)]
    texts += reference_answers(items[:6], run.tokenizer, run.recipe.data)
    found = []
    for start in range(0, len(texts), size):
        found += log_likelihoods(run.model, texts[start : start + size], run.tokenizer.pad_token_id)
    assert found == pytest.approx([by_token(run, text.ids, text.start) for text in texts], rel=1e-5)


def test_after_a_likelihood_the_model_gives_all_logits(run, items):
    texts = encode_choices(items[0], run.tokenizer, ChatTemplate(run.tokenizer))
    log_likelihoods(run.model, texts, run.tokenizer.pad_token_id)
    assert run.model(input_ids=torch.arange(3, 9).view(1, 6)).logits.shape == (1, 6, 512)


def test_an_answer_is_scored_with_its_end_token_and_never_cut(run, items):
    (found,) = reference_answers(items[:1], run.tokenizer, run.recipe.data)
    assert run.tokenizer.decode(found.ids[: found.start]) == prompt_text(ChatTemplate(run.tokenizer), items[0])
    assert run.tokenizer.decode(found.ids[found.start :]) == items[0]["answer"] + "<|im_end|>"
    assert len(found.ids) > run.recipe.data.seq_len


def test_of_several_answers_in_a_conversation_the_last_is_scored(run):
    turns = [{"role": role, "content": "a"} for role in ("system", "user", "assistant", "user")]
    (found,) = reference_answers([{"task": "t", "messages": turns, "answer": "b"}], run.tokenizer, run.recipe.data)
    assert found.scored == 2
    assert run.tokenizer.decode(found.ids[found.start :]) == "b<|im_end|>"


def test_choices_are_scored_without_an_end_token(run, items):
    texts = encode_choices(items[0], run.tokenizer, ChatTemplate(run.tokenizer))
    for choice, text in zip(items[0]["choices"], texts, strict=True):
        assert run.tokenizer.decode(text.ids[text.start :]) == choice
