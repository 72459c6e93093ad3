"""Greedy answers in batches, with a cache."""

from collections.abc import Sequence
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.documents import with_system_prompt
from trainer.evaluation.models import LoadedRun


def prompt_text(tokenizer: PreTrainedTokenizerBase, item: dict[str, Any]) -> str:
    """What the chat template writes up to where the answer to the item's `messages` begins, given its `tools`."""
    turns = list(item["messages"])
    return tokenizer.apply_chat_template(turns, tools=item.get("tools"), tokenize=False, add_generation_prompt=True)


def prompt_ids(tokenizer: PreTrainedTokenizerBase, item: dict[str, Any]) -> list[int]:
    return tokenizer(prompt_text(tokenizer, item), add_special_tokens=False)["input_ids"]


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
    synced: bool = False,
) -> list[str]:
    """The answer to each prompt, without special tokens.

    Pads on the left; transformers counts positions from the attention mask. synced: the model is sharded by ZeRO-3,
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
        synced_gpus=synced,
    )
    return tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)


def answer(run: LoadedRun, prompt: str, max_new_tokens: int) -> str:
    """The answer to one prompt, asked as the prepared set asks."""
    turns = with_system_prompt([{"role": "user", "content": prompt}], run.recipe.data.system_prompt)
    return greedy(run.model, run.tokenizer, [prompt_ids(run.tokenizer, {"messages": turns})], max_new_tokens)[0]
