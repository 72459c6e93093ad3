"""Tokens a second of our batched generation under an adapter, against plain `model.generate` on the bare base.

    python -m benchmarks.generate [BASE]

Both answer the same prompts with the same number of new tokens, greedily, on the same base in the same process, once
with decoder linears in NF4 and once in bf16. Ours is what `teamlora evaluate` does with a batch: padding, generation
with TeamLoRA (k = 4, r_B = 8, on all seven linears of a layer, experts drawn anew), decoding to text. Repetitions
interleave and give a ratio each; told are medians and quartiles. Time is CPU time of this process on a CPU, where
it has one thread, and the clock's on a GPU. The last line is one JSON object, whose
`tokens_over_plain` is the worse of the two bases.
"""

import argparse
import json
import statistics
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

DEFAULT_BASE = "bases/smollm2-135m-instruct"
BASES = {"nf4": "nf4", "bf16": "none"}  # name: base.quantization
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
    clock = time.perf_counter if torch.cuda.is_available() else time.process_time
    started = clock()
    work()  # ends with the answer on the host: nothing is left running on a GPU
    return clock() - started


def measure(base: BaseModelConfig, repetitions: int) -> tuple[list[float], list[float]]:
    """Seconds of a batch in each repetition: ours with the adapter, and plain generation without."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
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


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--repetitions", type=int, default=9, help="of each base (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"batch {BATCH}, {NEW_TOKENS} new tokens, 1 thread; tokens a second, medians")
    print(f"{'base':6} {'ours':>8} {'plain':>8}   ours over plain: median (quartiles)")
    found = {}
    for name, quantization in BASES.items():
        ours, plain = measure(BaseModelConfig(model=options.base, quantization=quantization), options.repetitions)
        low, middle, high = statistics.quantiles([p / o for o, p in zip(ours, plain, strict=True)], n=4)
        speeds = (BATCH * NEW_TOKENS / statistics.median(times) for times in (ours, plain))
        print("{:6} {:8.1f} {:8.1f}".format(name, *speeds), f"  {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
        found[f"tokens_over_plain_{name}"] = round(middle, 3)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"tokens_over_plain": min(found.values()), **found, "device": device, "batch": BATCH}))


if __name__ == "__main__":
    main()
