"""What a causal LM of transformers 5.23 does to logits after its output embedding: nothing, scaling, soft-capping.

It is the model's own code: the forward of its class, on a copy whose decoder and output embedding are stand-ins. No
module of the model runs, so none of its hooks does.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.modeling_outputs import MoeModelOutputWithPast

LogitsTail = Callable[[Tensor], Tensor]


def find_logits_tail(model: nn.Module) -> LogitsTail | None:
    """A function from the output embedding's logits [tokens, vocabulary] to the model's, each row by itself.

    model: a causal LM, which may be on meta or sharded, or PEFT's model of one. None where the class needs more than
    its decoder's output and its output embedding. No list says which do, so it is tried.
    """
    causal_lm = _causal_lm(model)
    head, embedding = causal_lm.get_output_embeddings(), causal_lm.get_input_embeddings()
    holders = [name for name, child in causal_lm.named_children() if embedding in child.modules()]
    heads = [name for name, child in causal_lm.named_children() if child is head]
    if len(holders) != 1 or len(heads) != 1:
        return None
    tail = _Tail(causal_lm, holders[0], heads[0])
    return tail if _works(tail) else None


def _causal_lm(model: nn.Module) -> PreTrainedModel:
    return cast(Any, model).get_base_model() if hasattr(model, "get_base_model") else cast(PreTrainedModel, model)


@dataclass
class _DecoderOutput(MoeModelOutputWithPast):
    """All that causal LMs read of their decoder's output."""

    cross_attentions: Any = None
    image_hidden_states: Any = None


@dataclass(frozen=True)
class _Tail:
    """decoder, head: names of the model's children. The copy has no other child: a class that uses one fails."""

    causal_lm: PreTrainedModel
    decoder: str
    head: str

    def __call__(self, logits: Tensor) -> Tensor:
        return self.run(logits)[0]

    def run(self, logits: Tensor) -> tuple[Tensor, list[str]]:
        """What becomes of logits [tokens, vocabulary]; and the stand-ins that were called, in this order."""
        called: list[str] = []
        ids = torch.zeros(1, len(logits), dtype=torch.int64, device=logits.device)

        def decoder(*_args: Any, **_named: Any) -> _DecoderOutput:
            called.append(self.decoder)
            return _DecoderOutput(last_hidden_state=cast(Any, logits.detach()[None, :, :1]))

        def head(_hidden: Tensor) -> Tensor:
            called.append(self.head)
            return logits[None]

        model: Any = copy.copy(self.causal_lm)
        model._modules = {self.decoder: decoder, self.head: head}
        return type(model).forward(model, input_ids=ids, use_cache=False).logits[0], called


def _works(tail: _Tail) -> bool:
    """Tried on two rows of one logit: the tail is the class's, whatever the sizes."""
    weight = tail.causal_lm.get_output_embeddings().weight
    try:
        logits, called = tail.run(torch.zeros(2, 1, device=weight.device))
    except Exception:
        return False
    return logits.shape == (2, 1) and called == [tail.decoder, tail.head]
