"""Logits at chosen positions only: the output embedding sees no other hidden state.

A forward pre-hook on the output embedding selects hidden states, so whatever the model does to logits after its head
(soft-capping, scaling) stays the model's own. A vocabulary of 128k makes logits the largest tensor of a step by far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel


@contextmanager
def head_sees(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within, the head gets hidden [positions, d] in place of [batch, seq, d]. positions: bool [batch, seq]."""
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()


def predicting(labelled: Tensor) -> Tensor:
    """Positions that predict labelled tokens: bool [batch, seq] from labelled bool [batch, seq - 1] of targets.

    Position t predicts token t + 1, so the last position predicts nothing.
    """
    return torch.cat((labelled, torch.zeros_like(labelled[:, :1])), dim=1)


def labelled_logits(model: nn.Module, batch: dict[str, Any], labelled: Tensor) -> Tensor:
    """Logits [labelled tokens, vocabulary] that predict the labelled tokens of a batch.

    batch: input_ids and position_ids, int64 [batch, seq], on the model's device. labelled: bool [batch, seq - 1] of
    targets batch["labels"][:, 1:].
    """
    head = cast(PreTrainedModel, model).get_output_embeddings()  # PEFT's model passes it on
    with head_sees(head, predicting(labelled)):
        return model(input_ids=batch["input_ids"], position_ids=batch["position_ids"], use_cache=False).logits
