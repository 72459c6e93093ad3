"""Greedy answers in batches, with a cache."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.documents import with_system_prompt
from data_prep.items import answer_of
from trainer.evaluation.loaded_models import LoadedRun


def prompt_text(template: ChatTemplate, item: dict[str, Any]) -> str:
    """What stands before the item's answer, or any where it has none, when a model is trained on it."""
    answer = answer_of(item) if "answer" in item else None
    return template.prompt(item["messages"], "the prompt", item.get("tools"), answer)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, item: dict[str, Any], template: ChatTemplate) -> list[int]:
    """Of `prompt_text`; template: the tokenizer's.

    A blank at the end is the model's to write, as in training: tokenizers join it to the word that follows.
    """
    return tokenizer(prompt_text(template, item).rstrip(" "), add_special_tokens=False)["input_ids"]


def ends_of(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[int]:
    """The tokens at which the template ends an answer, which is where training taught to stop: one or none."""
    token = template.end_token()
    return [tokenizer.convert_tokens_to_ids(token)] if token else []


def like_lengths(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of up to `size` of like length, so that little is padded; the longest first."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [by_length[start : start + size] for start in range(0, len(lengths), size)]


@torch.no_grad()
def greedy(
    model: PreTrainedModel | PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    ends: Sequence[int] = (),
    synced: bool = False,
) -> list[str]:
    """The answer to each prompt, without special tokens.

    Pads on the left; transformers counts positions from the attention mask. ends: tokens that end an answer, beside
    those that the base's generation_config names. synced: the model is sharded by ZeRO-3,
    and all ranks, which must all be here, make forwards until the last of them has its answers.
    """
    pad = tokenizer.pad_token_id
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    sequences = model.generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted({*ends, *named_ends(model)}) or None,
        synced_gpus=synced,
    )
    return tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)


def named_ends(model: PreTrainedModel | PeftModel) -> list[int]:
    """The tokens at which the base's generation_config ends an answer."""
    named = model.generation_config.eos_token_id
    return [] if named is None else [named] if isinstance(named, int) else list(named)


def answer(run: LoadedRun, prompt: str, max_new_tokens: int) -> str:
    """The answer to one prompt, asked as the prepared set asks."""
    turns = with_system_prompt([{"role": "user", "content": prompt}], run.recipe.data.system_prompt)
    template = ChatTemplate(run.tokenizer)
    asked = prompt_ids(run.tokenizer, {"messages": turns}, template)
    return greedy(run.model, run.tokenizer, [asked], max_new_tokens, ends_of(run.tokenizer, template))[0]
