"""Batched generation against a loop that asks one question at a time, without padding and without a cache."""

import pytest
import torch

from data_prep.chat import ChatTemplate
from trainer.evaluation.generation import answer, batches_by_length, generate_greedy, prompt_ids

NEW_TOKENS = 12


@torch.no_grad()
def one_by_one(run, prompt: list[int]) -> str:
    ids, end = torch.tensor([prompt]), run.tokenizer.eos_token_id
    for _ in range(NEW_TOKENS):
        following = run.model(input_ids=ids, use_cache=False).logits[0, -1].argmax().view(1, 1)
        ids = torch.cat([ids, following], dim=1)
        if following.item() == end:
            break
    return run.tokenizer.decode(ids[0, len(prompt) :], skip_special_tokens=True)


@pytest.mark.parametrize("size", [1, 3, 16])
def test_answers_are_those_of_one_question_at_a_time_whatever_the_batch(run, items, size):
    prompts = [prompt_ids(run.tokenizer, item, ChatTemplate(run.tokenizer)) for item in items]
    found = {}
    for batch in batches_by_length([len(p) for p in prompts], size):
        given = generate_greedy(run.model, run.tokenizer, [prompts[i] for i in batch], NEW_TOKENS)
        found |= dict(zip(batch, given, strict=True))
    assert [found[i] for i in range(len(items))] == [one_by_one(run, prompt) for prompt in prompts]


def test_the_adapter_takes_part(run, items):
    prompts = [prompt_ids(run.tokenizer, item, ChatTemplate(run.tokenizer)) for item in items]
    adapted = generate_greedy(run.model, run.tokenizer, prompts, NEW_TOKENS)
    with run.model.disable_adapter():
        assert generate_greedy(run.model, run.tokenizer, prompts, NEW_TOKENS) != adapted


def test_a_prompt_is_asked_with_the_recipes_system_prompt(run):
    turns = [{"role": "system", "content": "Give only the answer."}, {"role": "user", "content": "Sort b, a"}]
    prompt = prompt_ids(run.tokenizer, {"messages": turns}, ChatTemplate(run.tokenizer))
    assert answer(run, "Sort b, a", NEW_TOKENS) == one_by_one(run, prompt)


def test_batches_hold_every_index_once_and_like_lengths():
    lengths = [5, 1, 9, 4, 8]
    assert batches_by_length(lengths, 2) == [[2, 4], [0, 3], [1]]
