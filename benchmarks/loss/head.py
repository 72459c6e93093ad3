"""The part of a training step that is measured: final norm, output embedding and loss, forward and backward.

    python -m benchmarks.loss.head DTYPE CHUNK

runs it once and prints the peak of its memory in bytes, above what model and hidden states take. CHUNK: 0 is whole.
"""

import os
import sys
from functools import partial

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.shared.process_memory import PeakWatch, settled_bytes
from trainer.objective.chunked_logits import ChunkedLogits

TOKENS = 2048  # all of them labelled
VOCABULARY, HIDDEN = 151_936, 896  # those of Qwen2.5-0.5B
NARROW = 16  # hidden size where only memory is measured: the logits are as large, and sooner there
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


class Head:
    """A model without decoder layers, whose hidden states require a gradient as an adapted decoder's do."""

    def __init__(self, dtype: str, hidden: int = HIDDEN) -> None:
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=hidden,
            num_hidden_layers=0,
            num_attention_heads=2,
            tie_word_embeddings=True,
        )
        torch.set_default_dtype(DTYPES[dtype])
        self.model = LlamaForCausalLM(config).requires_grad_(False)
        self.hidden = torch.randn(1, TOKENS, hidden, requires_grad=True)
        torch.set_default_dtype(torch.float32)
        self.positions, self.targets = torch.arange(TOKENS), torch.randint(VOCABULARY, (TOKENS,))

    def step(self, chunk: int) -> tuple[float, Tensor]:
        """Loss per token and the gradient of the hidden states; chunk: tokens, 0 for whole logits."""
        forward = partial(self.model, inputs_embeds=self.hidden, use_cache=False)
        losses = ChunkedLogits(self.model, chunk).cross_entropy(forward, self.positions, self.targets)
        loss = losses.sum() / TOKENS
        (gradient,) = torch.autograd.grad(loss, self.hidden)
        return loss.item(), gradient


def main(dtype: str, chunk: int) -> None:
    head = Head(dtype, NARROW)
    before = settled_bytes()
    watch = PeakWatch()
    head.step(chunk)
    print(watch.peak() - before, flush=True)
    os._exit(0)  # what is left to free takes seconds


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
