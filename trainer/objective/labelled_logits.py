"""Logits at chosen positions only: the output embedding sees no other hidden state.

A forward pre-hook on the output embedding selects hidden states, so whatever the model does to logits after its head
(soft-capping, scaling) stays the model's own. A vocabulary of 128k makes logits the largest tensor of a step by far.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import cast

from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.base.packed_documents import document_arguments, packed_is_known
from trainer.objective.batches import Batch


@contextmanager
def head_sees(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within, the head gets hidden [positions, d] in place of [batch, seq, d].

    positions: int64, counted over all rows. A mask would make the host wait for the GPU.
    """
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0].flatten(0, 1)[positions],))
    try:
        yield
    finally:
        hook.remove()


def labelled_logits(model: nn.Module, batch: Batch) -> Tensor:
    """Logits [labelled tokens, vocabulary] that predict the labelled tokens of a batch on the model's device."""
    causal_lm = cast(PreTrainedModel, model)  # PEFT's model passes on what it is asked
    attention = causal_lm.config._attn_implementation
    documents = document_arguments(attention, batch["document_starts"], batch["longest_document"])
    ids, positions = batch["input_ids"], batch["position_ids"]
    packed = len(batch["document_starts"]) - 1 > len(ids)
    with packed_is_known(packed), head_sees(causal_lm.get_output_embeddings(), batch["predicting"]):
        return model(input_ids=ids, position_ids=positions, use_cache=False, **documents).logits
