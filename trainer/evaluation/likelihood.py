"""How likely a model finds given texts: the loss of wanted answers, and the choices of an item."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.encode import Encoder, Removed
from data_prep.items import answer_of
from data_prep.user_error import UserError

NEVER_CUT = 1 << 30  # tokens


@dataclass(frozen=True)
class Continuation:
    """A text of which the tokens from `start` on (1 or later) are scored, given those before them."""

    ids: list[int]
    start: int

    @property
    def scored(self) -> int:
        """Tokens that are scored."""
        return len(self.ids) - self.start


def wanted_answers(
    items: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Continuation]:
    """Each item's answer with its end token after its messages, encoded and labelled as for training, but never cut."""
    encoder = Encoder(tokenizer, config.model_copy(update={"mask_history": True, "seq_len": NEVER_CUT}))
    documents = []
    for index, item in enumerate(items):
        turns = [*item["messages"], answer_of(item)]
        documents.append(Document(item["task"], turns, f"item {index + 1}", tools=item.get("tools")))
    return [_last_turn(encoded) for encoded in encoder.encode(documents)]


def _last_turn(encoded: Any) -> Continuation:
    if isinstance(encoded, Removed):
        raise UserError(f"{encoded.place}: no answer to score ({encoded.reason}); prepare the data again")
    (scored,) = encoded.scored.nonzero()
    return Continuation(encoded.input_ids[: scored[-1] + 1].tolist(), int(scored[0]))


def choices_of(item: dict[str, Any], tokenizer: PreTrainedTokenizerBase, template: ChatTemplate) -> list[Continuation]:
    """Each of the item's choices where an answer without reasoning stands, with no end token, as lm-eval scores them.

    A blank at the end of the prompt is scored with the choice.
    """
    prompt = template.prompt(item["messages"], "the prompt", item.get("tools"))
    texts = [prompt.rstrip(" "), *(prompt + choice for choice in item["choices"])]
    before, *whole = tokenizer(texts, add_special_tokens=False)["input_ids"]
    return [Continuation(ids, min(len(before), len(ids) - 1)) for ids in whole]


@torch.no_grad()
def log_likelihoods(model: PreTrainedModel | PeftModel, texts: Sequence[Continuation], pad: int) -> list[float]:
    """The sum of log-probabilities, in nats, of each text's scored tokens.

    Pads on the right, where causal attention keeps the padding from all that is scored; the head computes logits
    [scored tokens, vocabulary] of no other position.
    """
    length = max(len(text.ids) for text in texts)
    ids = torch.tensor([text.ids + [pad] * (length - len(text.ids)) for text in texts], device=model.device)
    predicting = torch.zeros_like(ids, dtype=torch.bool)
    for row, text in zip(predicting, texts, strict=True):
        row[text.start - 1 : len(text.ids) - 1] = True
    with _head_sees(model.get_output_embeddings(), predicting):
        logits = model(input_ids=ids, use_cache=False).logits
    losses = F.cross_entropy(logits.float(), ids[:, 1:][predicting[:, :-1]], reduction="none").double()
    return [-part.sum().item() for part in losses.split([text.scored for text in texts])]


@contextlib.contextmanager
def _head_sees(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """hidden [batch, seq, d] -> [positions, d] before the head; what the model does after it stays the model's own."""
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0][positions],))
    try:
        yield
    finally:
        hook.remove()
