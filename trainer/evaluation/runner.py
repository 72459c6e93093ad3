"""Every held-out item put to one model: what it answers, and how likely it finds the wanted answer and the choices."""

from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from trainer.evaluation.generation import ends_of, greedy, like_lengths, prompt_ids
from trainer.evaluation.likelihood import Continuation, choices_of, log_likelihoods, wanted_answers
from trainer.evaluation.rank_map import map_over_ranks
from trainer.evaluation.scoring import CHOICES, TEXT_METRICS, likeliest, likeliest_by_length

MARGIN = 4  # tokens that an answer may be longer than the longest wanted answer of its task


@dataclass(frozen=True)
class Questions:
    """Items as a model gets them.

    prompts: token ids; room: most tokens of an answer; choices: [] where it has none; ends: tokens that end an answer.
    """

    items: Sequence[dict[str, Any]]
    prompts: Sequence[list[int]]
    room: Sequence[int]
    wanted: Sequence[Continuation]
    choices: Sequence[list[Continuation]]
    ends: Sequence[int]


@dataclass(frozen=True)
class RunnerOptions:
    """How questions are put. sharded: all ranks share the model's parameters, and every rank makes every forward."""

    tokenizer: PreTrainedTokenizerBase
    batch_size: int
    sharded: bool


def some_of_each_task(items: Sequence[dict[str, Any]], count: int) -> list[dict[str, Any]]:
    """At most `count` of each task, in order, evenly spread: items lie in the order of their sources and files."""
    totals = Counter(item["task"] for item in items)
    seen: Counter[str] = Counter()
    kept = []
    for item in items:
        number, total = seen[item["task"]], totals[item["task"]]
        seen[item["task"]] += 1
        if number * count // total > (number - 1) * count // total:
            kept.append(item)
    return kept


def questions(items: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig) -> Questions:
    """What stands before an answer by the chat template stands there already when a model is asked."""
    template = ChatTemplate(tokenizer)
    wanted = wanted_answers(items, tokenizer, config)
    longest: Counter[str] = Counter()
    for item, text in zip(items, wanted, strict=True):
        longest[item["task"]] = max(longest[item["task"]], text.scored)
    return Questions(
        items,
        [prompt_ids(tokenizer, item, template) for item in items],
        [longest[item["task"]] + MARGIN for item in items],
        wanted,
        [choices_of(item, tokenizer, template) if item.get("choices") else [] for item in items],
        ends_of(tokenizer, template),
    )


def ask(model: PreTrainedModel | PeftModel, asked: Questions, asking: RunnerOptions) -> list[dict[str, Any]]:
    """For each item what the model gave, and its scores. Every rank takes part, and gets all.

    given: its answer; exact_match, token_f1, rouge_l of that; loss and tokens: nats of the wanted answer in all, and
    the tokens of it; where the item has choices, chosen: the likeliest; choices and choices_by_length: whether the
    wanted answer is the likeliest, by sum and by sum over length.
    """
    given = _answers(model, asked, asking)
    likelihoods = _likelihoods(model, [*asked.wanted, *(text for texts in asked.choices for text in texts)], asking)
    of_wanted, of_choices = likelihoods[: len(asked.items)], iter(likelihoods[len(asked.items) :])
    found = []
    for item, text, wanted, total, choices in zip(
        asked.items, given, asked.wanted, of_wanted, asked.choices, strict=True
    ):
        scores: dict[str, Any] = {"given": text, "loss": -total, "tokens": wanted.scored}
        scores |= {name: score(text, item["answer"]) for name, score in TEXT_METRICS.items()}
        found.append(scores | _chosen(item, [next(of_choices) for _ in choices]))
    return found


def _chosen(item: dict[str, Any], totals: Sequence[float]) -> dict[str, Any]:
    if not totals:
        return {}
    choices = item["choices"]
    chosen, by_length = choices[likeliest(totals)], choices[likeliest_by_length(totals, choices)]
    right = {CHOICES: chosen == item["answer"], f"{CHOICES}_by_length": by_length == item["answer"]}
    return {"chosen": chosen, **{name: float(value) for name, value in right.items()}}


def _answers(model: PreTrainedModel | PeftModel, asked: Questions, asking: RunnerOptions) -> list[str]:
    """A task at a time, since what is long for one is short for another; the longest first: ranks end together."""
    by_room: dict[tuple[str, int], list[int]] = {}
    for index, item in enumerate(asked.items):
        by_room.setdefault((item["task"], asked.room[index]), []).append(index)
    batches = [
        [mine[i] for i in batch]
        for _, mine in sorted(by_room.items(), key=lambda entry: -entry[0][1])
        for batch in like_lengths([len(asked.prompts[i]) for i in mine], asking.batch_size)
    ]

    def work(batch: Sequence[int]) -> list[str]:
        prompts = [asked.prompts[i] for i in batch]
        return greedy(model, asking.tokenizer, prompts, asked.room[batch[0]], asked.ends, asking.sharded)

    idle = partial(greedy, model, asking.tokenizer, [asked.prompts[0][:1]], 1, synced=True)
    return _dealt(batches, work, idle, asking)


def _likelihoods(
    model: PreTrainedModel | PeftModel, texts: Sequence[Continuation], asking: RunnerOptions
) -> list[float]:
    def work(batch: Sequence[int]) -> list[float]:
        return log_likelihoods(model, [texts[i] for i in batch], asking.tokenizer.pad_token_id)

    batches = like_lengths([len(text.ids) for text in texts], asking.batch_size)
    idle = partial(log_likelihoods, model, [Continuation(texts[0].ids[:2], 1)], asking.tokenizer.pad_token_id)
    return _dealt(batches, work, idle, asking)


def _dealt(batches: list[list[int]], work: Callable, idle: Callable, asking: RunnerOptions) -> list[Any]:
    """The results of all batches, in the order of what their indices index."""
    found = map_over_ranks(batches, work, idle if asking.sharded else None)
    by_index = {i: one for batch, ones in zip(batches, found, strict=True) for i, one in zip(batch, ones, strict=True)}
    return [by_index[i] for i in range(len(by_index))]
