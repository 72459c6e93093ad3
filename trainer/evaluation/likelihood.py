"""Log-likelihoods of given texts: the loss on reference answers, and the choices of multiple-choice items."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.control_tokens import ControlTokens
from data_prep.documents import Document
from data_prep.encode import Encoder, Removed
from data_prep.items import answer_of
from data_prep.template_renderer import TEMPLATE_SETTINGS
from data_prep.user_error import UserError
from trainer.evaluation.loaded_models import CausalLM
from trainer.objective.chunked_logits import ChunkedLogits

NEVER_CUT = 1 << 30  # tokens


@dataclass(frozen=True)
class Continuation:
    """A text whose tokens from `start` on (1 or later) are scored, given the tokens before them."""

    ids: list[int]
    start: int

    @property
    def scored(self) -> int:
        """Number of scored tokens."""
        return len(self.ids) - self.start


def reference_answers(
    items: Sequence[dict[str, Any]], tokenizer: PreTrainedTokenizerBase, config: DataConfig
) -> list[Continuation]:
    """Each item's messages, answer and end token, encoded and labelled as for training, but never cut."""
    encoder = Encoder(tokenizer, config.model_copy(update={"mask_history": True, "seq_len": NEVER_CUT}))
    documents = []
    for index, item in enumerate(items):
        turns = [*item["messages"], answer_of(item)]
        tools, settings = item.get("tools"), item.get(TEMPLATE_SETTINGS)
        documents.append(Document(item["task"], turns, f"item {index + 1}", tools=tools, settings=settings))
    return [_last_turn(encoded) for encoded in encoder.encode(documents)]


def _last_turn(encoded: Any) -> Continuation:
    if isinstance(encoded, Removed):
        raise UserError(f"{encoded.place}: no answer to score ({encoded.reason}); prepare the data again")
    (scored,) = encoded.scored.nonzero()
    return Continuation(encoded.input_ids[: scored[-1] + 1].tolist(), int(scored[0]))


def encode_choices(
    item: dict[str, Any],
    tokenizer: PreTrainedTokenizerBase,
    template: ChatTemplate,
    control: ControlTokens | None = None,
) -> list[Continuation]:
    """Each of the item's choices in the place of an answer without reasoning. No end token, as in lm-eval.

    A space at the prompt's end is scored with the choice. template, control: the tokenizer's, as in prompt_ids.
    """
    control = control or ControlTokens(tokenizer)
    hidden, found = control.hide(item, "the prompt")
    template = template.with_settings(hidden.get(TEMPLATE_SETTINGS), "the prompt")
    prompt = template.prompt(hidden["messages"], "the prompt", hidden.get("tools"))
    texts = [prompt.rstrip(" "), *(prompt + choice for choice in hidden["choices"])]
    before, *full_texts = [encoding.ids for encoding in control.encode(texts, [bool(found)] * len(texts))]
    return [Continuation(ids, min(len(before), len(ids) - 1)) for ids in full_texts]


@torch.no_grad()
def log_likelihoods(model: CausalLM, texts: Sequence[Continuation], pad: int) -> list[float]:
    """The sum of log-probabilities, in nats, of each text's scored tokens.

    Pads on the right, where causal attention hides the padding from all scored tokens. The head computes only the
    logits that predict them, a chunk at a time.
    """
    length = max(len(text.ids) for text in texts)
    ids = torch.tensor([text.ids + [pad] * (length - len(text.ids)) for text in texts], device=model.device)
    places = [row * length + i for row, text in enumerate(texts) for i in range(text.start - 1, len(text.ids) - 1)]
    predicting = torch.tensor(places, dtype=torch.int64, device=model.device)
    forward = partial(model, input_ids=ids, use_cache=False)
    losses = ChunkedLogits(model).cross_entropy(forward, predicting, ids.flatten()[predicting + 1])
    return [-part.sum().item() for part in losses.double().split([text.scored for text in texts])]
