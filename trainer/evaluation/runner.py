"""Runs one model on all held-out items: its generated answers, and the likelihoods of reference answers and choices."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from transformers import PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.control_tokens import ControlTokens
from data_prep.documents import reasoning_parts
from data_prep.items import answer_of
from trainer.evaluation.generation import batches_by_length, generate_greedy, prompt_ids, template_end_ids
from trainer.evaluation.likelihood import Continuation, encode_choices, log_likelihoods, reference_answers
from trainer.evaluation.loaded_models import CausalLM
from trainer.evaluation.rank_map import map_over_ranks
from trainer.evaluation.scoring import CHOICES, TEXT_METRICS, likeliest, likeliest_by_length

MARGIN = 4  # tokens that an answer may be longer than the longest reference answer of its task


@dataclass(frozen=True)
class Questions:
    """Encoded items.

    prompts: token ids. max_new_tokens: limit for each generated answer. choices: [] for items without choices.
    end_ids: tokens that end an answer.
    """

    items: Sequence[dict[str, Any]]
    prompts: Sequence[list[int]]
    max_new_tokens: Sequence[int]
    references: Sequence[Continuation]
    choices: Sequence[list[Continuation]]
    end_ids: Sequence[int]


@dataclass(frozen=True)
class RunnerOptions:
    """sharded: all ranks share the model's parameters (ZeRO-3), so every rank must take part in every forward."""

    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    sharded: bool


def sample_per_task(items: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` items per task, evenly spread, in order: neighbors come from the same source and file."""
    totals = Counter(item["task"] for item in items)
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        number, total = seen[item["task"]], totals[item["task"]]
        seen[item["task"]] += 1
        if number * count // total > (number - 1) * count // total:
            kept.append(item)
    return kept


def build_questions(
    items: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> Questions:
    """Encodes items. What the chat template puts before an answer is part of the prompt."""
    template, control = ChatTemplate(tokenizer), ControlTokens(tokenizer, config.special_tokens_in_text)
    references = reference_answers(items, tokenizer, config)
    longest: Counter[str] = Counter()
    for item, reference in zip(items, references, strict=True):
        longest[item["task"]] = max(longest[item["task"]], reference.scored)
    return Questions(
        items,
        [prompt_ids(tokenizer, item, template, control) for item in items],
        [longest[item["task"]] + MARGIN for item in items],
        references,
        [encode_choices(item, tokenizer, template, control) if item.get("choices") else [] for item in items],
        template_end_ids(tokenizer, template, any(reasoning_parts(answer_of(item)) for item in items)),
    )


def run_items(model: CausalLM, questions: Questions, options: RunnerOptions) -> list[dict[str, Any]]:
    """Each item's generated answer and scores, on every rank. Collective.

    given: the answer; exact_match, token_f1, rouge_l: its scores; loss: nats of the whole reference answer; tokens: its
    length. For items with choices, chosen: the likeliest choice; choices and choices_by_length: whether the reference
    answer is the likeliest, by log-likelihood and by log-likelihood per character.
    """
    answers = _generate(model, questions, options)
    choice_texts = [text for texts in questions.choices for text in texts]
    likelihoods = _likelihoods(model, [*questions.references, *choice_texts], options)
    of_references, of_choices = likelihoods[: len(questions.items)], iter(likelihoods[len(questions.items) :])
    results = []
    for item, given, reference, total, choices in zip(
        questions.items, answers, questions.references, of_references, questions.choices, strict=True
    ):
        scores: dict[str, Any] = {"given": given, "loss": -total, "tokens": reference.scored}
        scores |= {name: score(given, item["answer"]) for name, score in TEXT_METRICS.items()}
        results.append(scores | _score_choices(item, [next(of_choices) for _ in choices]))
    return results


def _score_choices(item: dict[str, Any], totals: Sequence[float]) -> dict[str, Any]:
    if not totals:
        return {}
    choices = item["choices"]
    chosen, by_length = choices[likeliest(totals)], choices[likeliest_by_length(totals, choices)]
    right = {CHOICES: chosen == item["answer"], f"{CHOICES}_by_length": by_length == item["answer"]}
    return {"chosen": chosen, **{name: float(value) for name, value in right.items()}}


def _generate(model: CausalLM, questions: Questions, options: RunnerOptions) -> list[str]:
    """Batches hold one task each, since tasks differ in answer length. Longest answers first: ranks end together."""
    by_task: dict[tuple[str, int], list[int]] = {}
    for index, item in enumerate(questions.items):
        by_task.setdefault((item["task"], questions.max_new_tokens[index]), []).append(index)
    batches = [
        [indices[i] for i in batch]
        for _, indices in sorted(by_task.items(), key=lambda entry: -entry[0][1])
        for batch in batches_by_length([len(questions.prompts[i]) for i in indices], options.batch_size)
    ]

    def work(batch: Sequence[int]) -> list[str]:
        prompts = [questions.prompts[i] for i in batch]
        limit = questions.max_new_tokens[batch[0]]
        return generate_greedy(model, options.tokenizer, prompts, limit, questions.end_ids, options.sharded)

    idle = partial(generate_greedy, model, options.tokenizer, [questions.prompts[0][:1]], 1, synced=True)
    return _map_batches(batches, work, idle, options)


def _likelihoods(model: CausalLM, texts: Sequence[Continuation], options: RunnerOptions) -> list[float]:
    def work(batch: Sequence[int]) -> list[float]:
        return log_likelihoods(model, [texts[i] for i in batch], options.tokenizer.pad_token_id)

    batches = batches_by_length([len(text.ids) for text in texts], options.batch_size)
    idle = partial(log_likelihoods, model, [Continuation(texts[0].ids[:2], 1)], options.tokenizer.pad_token_id)
    return _map_batches(batches, work, idle, options)


def _map_batches(batches: list[list[int]], work: Callable, idle: Callable, options: RunnerOptions) -> list[Any]:
    """The results of all batches of indices, in the order of the indices. Collective."""
    results = map_over_ranks(batches, work, idle if options.sharded else None)
    by_index = {
        index: result
        for batch, batch_results in zip(batches, results, strict=True)
        for index, result in zip(batch, batch_results, strict=True)
    }
    return [by_index[i] for i in range(len(by_index))]
