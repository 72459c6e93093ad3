"""One base of the generate benchmark: batched generation under an adapter, and plain generation on the bare base."""

import time
from collections.abc import Callable, Sequence

import torch
from peft import get_peft_model
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from trainer.adapters import TeamLoraConfig
from trainer.adapters.layer import Experts, freeze_experts
from trainer.base.loader import load_base
from trainer.base.model_config import load_tokenizer
from trainer.evaluation.generation import generate_greedy, prompt_ids
from trainer.recipe import BaseModelConfig
from trainer.run.gpu import compute_device

BATCH = 16
NEW_TOKENS = 32
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def prompts_of(tokenizer: PreTrainedTokenizerBase) -> list[list[int]]:
    """A batch of questions of unequal length."""
    asked = [f"What are these numbers in words: {', '.join(map(str, range(i, 2 * i + 3)))}?" for i in range(BATCH)]
    template = ChatTemplate(tokenizer)
    return [prompt_ids(tokenizer, {"messages": [{"role": "user", "content": text}]}, template) for text in asked]


@torch.no_grad()
def adapted(base: PreTrainedModel) -> PreTrainedModel:
    """The base under an adapter that changes its output."""
    config = TeamLoraConfig(num_experts=4, expert_rank=8, alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM")
    model = get_peft_model(base, config, autocast_adapter_dtype=False).eval()
    for module in model.modules():
        if isinstance(module, Experts):
            torch.nn.init.normal_(module.experts, std=0.02)
    freeze_experts(model)
    return model


def seconds(work: Callable[[], object]) -> float:
    clock = time.process_time if compute_device().type == "cpu" else time.perf_counter
    started = clock()
    work()  # ends with the answer on the host: nothing is left running on a GPU
    return clock() - started


def measure(base: BaseModelConfig, repetitions: int) -> tuple[list[float], list[float]]:
    """Seconds of a batch in each repetition: ours with the adapter, and plain generation without."""
    device = compute_device()
    tokenizer = load_tokenizer(base)
    prompts = prompts_of(tokenizer)
    bare = load_base(base, device)
    under_adapter = adapted(load_base(base, device))
    for model in (bare, under_adapter):
        model.generation_config.min_new_tokens = NEW_TOKENS
    padded = left_padded(tokenizer, prompts).to(device)

    def plain() -> None:
        bare.generate(
            input_ids=padded,
            attention_mask=mask_of(prompts).to(device),
            max_new_tokens=NEW_TOKENS,
            do_sample=False,
            pad_token_id=tokenizer.pad_token_id,
        )

    def ours() -> None:
        generate_greedy(under_adapter, tokenizer, prompts, NEW_TOKENS)

    times: tuple[list[float], list[float]] = ([], [])
    for repetition in range(-1, repetitions):
        both = list(zip((ours, plain), times, strict=True))
        for work, kept in both if repetition % 2 else reversed(both):
            taken = seconds(work)
            if repetition >= 0:
                kept.append(taken)
    return times


def left_padded(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[list[int]]) -> Tensor:
    """int64 [batch, seq]"""
    length = max(map(len, prompts))
    return torch.tensor([[tokenizer.pad_token_id] * (length - len(p)) + p for p in prompts])


def mask_of(prompts: Sequence[list[int]]) -> Tensor:
    """int64 [batch, seq]: 0 for padding."""
    length = max(map(len, prompts))
    return torch.tensor([[0] * (length - len(p)) + [1] * len(p) for p in prompts])
