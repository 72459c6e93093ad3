"""Greedy generation in batches, with a KV cache."""

from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.control_tokens import ControlTokens
from data_prep.documents import with_system_prompt
from data_prep.items import answer_of
from data_prep.template_renderer import TEMPLATE_SETTINGS
from trainer.evaluation.loaded_models import CausalLM, LoadedRun


def prompt_text(template: ChatTemplate, item: dict[str, Any]) -> str:
    """The text before the item's answer, or before any answer if the item has none, as in training."""
    answer = answer_of(item) if "answer" in item else None
    template = template.with_settings(item.get(TEMPLATE_SETTINGS), "the prompt")
    return template.prompt(item["messages"], "the prompt", item.get("tools"), answer)


def prompt_ids(
    tokenizer: PreTrainedTokenizerBase,
    item: dict[str, Any],
    template: ChatTemplate,
    control: ControlTokens | None = None,
) -> list[int]:
    """Token ids of `prompt_text`. template, control: the tokenizer's; None: as text in the item is encoded by default.

    The model writes a space at the prompt's end itself, as in training: tokenizers join it to the next word.
    """
    control = control or ControlTokens(tokenizer)
    hidden, found = control.hide(item, "the prompt")
    return control.encode([prompt_text(template, hidden).rstrip(" ")], [bool(found)])[0].ids


def template_end_ids(tokenizer: PreTrainedTokenizerBase, template: ChatTemplate, reasons: bool = False) -> list[int]:
    """The tokens that end an answer or a call in training, which the model learned to write: none or more.

    reasons: the model writes its reasoning as well; see ChatTemplate.stop_tokens.
    """
    return _as_list(tokenizer.convert_tokens_to_ids(template.stop_tokens(reasons)))


def config_end_ids(model: CausalLM) -> list[int]:
    """The tokens that end an answer according to the base's generation_config."""
    return _as_list(model.generation_config.eos_token_id)


def _as_list(ids: int | list[int] | None) -> list[int]:
    return [] if ids is None else [ids] if isinstance(ids, int) else list(ids)


def batches_by_length(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Indices in batches of up to `size` of similar length, longest first, to keep padding small."""
    by_length = sorted(range(len(lengths)), key=lambda i: -lengths[i])
    return [by_length[start : start + size] for start in range(0, len(lengths), size)]


@torch.no_grad()
def generate_greedy(
    model: CausalLM,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    end_ids: Sequence[int] = (),
    synced: bool = False,
) -> list[str]:
    """The answer to each prompt, without special tokens.

    Pads on the left; transformers derives positions from the attention mask. end_ids: tokens that end an answer, in
    addition to those of the base's generation_config. synced: the model is sharded by ZeRO-3. The call is then
    collective, and all ranks keep running forwards until the last rank has its answers.
    """
    pad = tokenizer.pad_token_id
    length = max(map(len, prompts))
    ids = torch.tensor([[pad] * (length - len(p)) + list(p) for p in prompts], device=model.device)
    mask = torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts], device=model.device)
    generate = cast(Callable[..., Tensor], model.generate)
    sequences = generate(
        input_ids=ids,
        attention_mask=mask,
        max_new_tokens=max_new_tokens,
        do_sample=False,
        pad_token_id=pad,
        eos_token_id=sorted({*end_ids, *config_end_ids(model)}) or None,
        synced_gpus=synced,
    )
    return tokenizer.batch_decode(sequences[:, length:], skip_special_tokens=True)


def answer(run: LoadedRun, prompt: str, max_new_tokens: int) -> str:
    """The answer to one user prompt, with the system prompt and chat template of the run's data."""
    turns = with_system_prompt([{"role": "user", "content": prompt}], run.recipe.data.system_prompt)
    template = ChatTemplate(run.tokenizer)
    control = ControlTokens(run.tokenizer, run.recipe.data.special_tokens_in_text)
    ids = prompt_ids(run.tokenizer, {"messages": turns}, template, control)
    end_ids = template_end_ids(run.tokenizer, template)
    return generate_greedy(run.model, run.tokenizer, [ids], max_new_tokens, end_ids)[0]
