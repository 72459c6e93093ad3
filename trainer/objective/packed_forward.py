"""A causal LM's forward on a batch of packed rows, whose documents do not see one another."""

from collections.abc import Callable
from typing import Any, cast

from torch import nn
from transformers import PreTrainedModel

from trainer.base.packed_documents import document_arguments, packed_is_known
from trainer.objective.batches import Batch


def packed_forward(model: nn.Module, batch: Batch) -> Callable[[], Any]:
    """The model's forward on this batch, which is on the model's device, to be called once."""
    attention = cast(PreTrainedModel, model).config._attn_implementation  # PEFT's model passes on what it is asked
    documents = document_arguments(attention, batch["document_starts"], batch["longest_document"])
    ids, positions = batch["input_ids"], batch["position_ids"]
    packed = len(batch["document_starts"]) - 1 > len(ids)

    def forward() -> Any:
        with packed_is_known(packed):
            return model(input_ids=ids, position_ids=positions, use_cache=False, **documents)

    return forward
