"""Answers from a trained run: the base it was trained on, its adapter, and greedy decoding in batches."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from data_prep.documents import Message, with_system_prompt
from trainer import rundir
from trainer.base.fingerprint import check_base_file
from trainer.base.load import load_opened
from trainer.base.match import open_base
from trainer.base.shards import Whole
from trainer.base.source import load_tokenizer
from trainer.recipe import Recipe


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in one process: its base whole on one device, under its adapter."""

    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_run(directory: Path) -> LoadedRun:
    """Raises UserError where there is no finished run, or its base cannot be used."""
    recipe = rundir.open_run(directory)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    adapter = directory / rundir.ADAPTER
    opened = open_base(recipe.base)
    check_base_file(adapter, recipe.base.model, opened.fingerprint)
    base = load_opened(opened, Whole(device))
    model = PeftModel.from_pretrained(base, str(adapter), autocast_adapter_dtype=False)
    # Generation gives the head a strided slice, for which a CPU would copy the head's weight once for every row.
    model.get_output_embeddings().register_forward_pre_hook(lambda _head, args: (args[0].contiguous(),))
    return LoadedRun(recipe, model.eval(), load_tokenizer(recipe.base, recipe.data.chat_template))


def answers(run: LoadedRun, items: Sequence[dict[str, Any]], max_new_tokens: int, batch_size: int) -> list[str]:
    """The model's greedy answer to each item's `messages`, given its `tools`, in their order; no special tokens."""
    prompts = [_prompt(run.tokenizer, item["messages"], item.get("tools")) for item in items]
    found = [""] * len(prompts)
    for indices in _batches(prompts, batch_size):
        for index, answer in zip(indices, _generate(run, [prompts[i] for i in indices], max_new_tokens), strict=True):
            found[index] = answer
    return found


def answer(run: LoadedRun, prompt: str, max_new_tokens: int) -> str:
    """The answer to one prompt, asked as the prepared set asks."""
    turns = with_system_prompt([{"role": "user", "content": prompt}], run.recipe.data.system_prompt)
    return answers(run, [{"messages": turns}], max_new_tokens, batch_size=1)[0]


def _prompt(tokenizer: PreTrainedTokenizerBase, turns: Sequence[Message], tools: list[Any] | None) -> list[int]:
    text = tokenizer.apply_chat_template(list(turns), tools=tools, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _batches(prompts: Sequence[list[int]], batch_size: int) -> Iterator[list[int]]:
    """Indices of prompts of like length, so that little is padded."""
    by_length = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    for start in range(0, len(prompts), batch_size):
        yield by_length[start : start + batch_size]


@torch.no_grad()
def _generate(run: LoadedRun, prompts: Sequence[list[int]], max_new_tokens: int) -> list[str]:
    """Pads on the left; transformers counts positions from the attention mask."""
    pad = run.tokenizer.pad_token_id
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + p for p in prompts], device=run.model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=run.model.device)
    sequences = run.model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=max_new_tokens, do_sample=False, pad_token_id=pad
    )
    return run.tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)
