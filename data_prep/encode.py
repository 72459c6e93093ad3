"""Turns documents into token ids and labels."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from data_prep.chat import ChatTemplate, check_offsets
from data_prep.config import DataConfig
from data_prep.control_tokens import ControlTokens
from data_prep.documents import Document, with_system_prompt
from data_prep.omissions import omissions
from data_prep.template_renderer import Span
from data_prep.tokenizer_checks import embedding_rows, refuse_beyond_embedding
from data_prep.user_error import UserError

IGNORED = -100  # label of tokens that are not scored, as in torch and transformers

_NOT_WRITTEN = " (not in the chat template)"

NO_ASSISTANT_TURN = "no_assistant_turn"
EMPTY_ANSWER = "empty_answer"
BAD_ROW = "bad_row"
OVER_LONG = "over_long"
NO_LABELS_AFTER_CUT = "no_labels_after_cut"


@dataclass(frozen=True, slots=True)
class Remarks:
    """Notes on one document, for the report."""

    tokens_in_text: frozenset[str] = frozenset()  # control tokens that its text holds, for which stand-ins are rendered
    left_out: frozenset[str] = frozenset()  # what the chat template does not write of it


@dataclass(frozen=True, slots=True)
class Encoded:
    """A document, or a piece of one, ready for packing: two arrays of shape [tokens], at most seq_len tokens."""

    document: Document
    input_ids: np.ndarray  # int32
    scored: np.ndarray  # bool: whether the token is a label, as in assistant turns and their end tokens
    piece: int  # 0, 1, ... if the document was split
    cut: bool  # whether the document was longer than seq_len
    remarks: Remarks = Remarks()  # on the whole document

    def __len__(self) -> int:
        return len(self.input_ids)


@dataclass(frozen=True, slots=True)
class Removed:
    """A document, or a piece of one, from which nothing can be learned, and why."""

    place: str  # where it is in the source, and for BAD_ROW what is wrong with it
    reason: str
    piece: int = 0  # as in Encoded
    remarks: Remarks = Remarks()  # as in Encoded


@dataclass(frozen=True, slots=True)
class _Rendered:
    """The text of a document for the tokenizer, and the spans of characters to learn."""

    text: str
    spans: list[Span]
    remarks: Remarks


class Encoder:
    """Tokenizes documents and labels what is to be learned, by character position, never by token id.

    Raises UserError if the tokenizer gives no character offsets or, for conversations, has no chat template.
    """

    def __init__(self, tokenizer: Any, config: DataConfig):
        check_offsets(tokenizer)
        self._tokenizer = tokenizer
        self._config = config
        self._template: ChatTemplate | None = None
        self._control = ControlTokens(tokenizer, config.special_tokens_in_text)
        self._rows = embedding_rows(tokenizer)
        # bos, if the tokenizer itself adds it before a text; chat templates write their own
        backend = tokenizer.backend_tokenizer
        with_specials, without = (backend.encode("a", add_special_tokens=s).ids for s in (True, False))
        starts = with_specials[: len(with_specials) - len(without)]
        self._opening = np.array([tokenizer.bos_token_id] if tokenizer.bos_token_id in starts else [], np.int32)

    @property
    def template(self) -> ChatTemplate:
        """The chat template. Raises UserError if the tokenizer has none."""
        self._template = self._template or ChatTemplate(self._tokenizer)
        return self._template

    def encode(self, documents: Sequence[Document]) -> list[Encoded | Removed]:
        """The documents in order, each encoded, encoded in several pieces, or removed."""
        rendered = [self._rendered(document) for document in documents]
        texts = [result for result in rendered if not isinstance(result, Removed)]
        # The template has already written the special tokens.
        encodings = iter(self._control.encode([t.text for t in texts], [bool(t.remarks.tokens_in_text) for t in texts]))
        results: list[Encoded | Removed] = []
        for document, result in zip(documents, rendered, strict=True):
            if isinstance(result, Removed):
                results.append(result)
            else:
                results += self._pieces(document, result, next(encodings))
        return results

    def _rendered(self, document: Document) -> "_Rendered | Removed":
        """The document's text and what to learn of it.

        Raises UserError if the template refuses the conversation, unless the recipe drops bad rows.
        """
        if reason := self._unusable(document):
            return Removed(document.origin, reason)
        try:
            return self._render(document)
        except UserError as error:
            if self._config.cleaning.bad_rows == "refuse":
                raise
            return Removed(str(error), BAD_ROW)

    def _unusable(self, document: Document) -> str | None:
        if document.text is not None:
            return None if document.text.strip() else EMPTY_ANSWER
        turns = document.learned_turns(self._config.mask_history)
        if not turns:
            return NO_ASSISTANT_TURN
        answers = (document.messages[index] for index in turns)
        empty = any(not (turn.get("content") or "").strip() and not turn.get("tool_calls") for turn in answers)
        return EMPTY_ANSWER if empty else None

    def _render(self, document: Document) -> "_Rendered":
        if document.text is not None:
            own, hidden = self._control.hide(document.text, document.origin)
            text = own + (self._tokenizer.eos_token or "")
            return _Rendered(text, [(0, len(text))], Remarks(hidden))
        given = with_system_prompt(document.messages, self._config.system_prompt)
        said = [given, document.tools, document.settings]
        (messages, tools, settings), hidden = self._control.hide(said, document.origin)
        template = self.template.with_settings(settings, document.origin)
        rendered = template.learned(messages, document.origin, tools)
        left_out = [f"setting {name}" for name in template.unknown_settings(settings)]
        left_out += omissions(rendered.text, rendered.spans, messages)
        added = len(messages) - len(document.messages)
        learned = document.learned_turns(self._config.mask_history)
        spans = [span for index in learned for span in rendered.parts[index + added]]
        return _Rendered(rendered.text, spans, Remarks(hidden, frozenset(what + _NOT_WRITTEN for what in left_out)))

    def _pieces(self, document: Document, rendered: "_Rendered", encoding: Any) -> list[Encoded | Removed]:
        ids = np.array(encoding.ids, dtype=np.int32)
        scored = _scored(encoding, len(rendered.text), rendered.spans)
        if document.text is not None:  # not within the text: some tokenizers then write no space after it
            ids = np.concatenate([self._opening, ids])
            scored = np.concatenate([np.zeros(len(self._opening), bool), scored])
        if self._rows is not None and len(ids) and ids.max() >= self._rows:
            refuse_beyond_embedding(self._tokenizer, int(ids.max()), self._rows, f"used in {document.origin}")
        seq_len, over_long = self._config.seq_len, len(ids) > self._config.seq_len
        if not over_long:
            starts = [0]
        elif self._config.over_long == "split":
            starts = list(range(0, len(ids), seq_len))
        elif self._config.over_long == "drop":
            return [Removed(document.origin, OVER_LONG, 0, rendered.remarks)]
        else:
            starts = [0 if self._config.over_long == "cut_right" else len(ids) - seq_len]
        pieces: list[Encoded | Removed] = []
        for piece, start in enumerate(starts):
            learned = scored[start : start + seq_len].copy()
            learned[:1] = False  # in a packed row it would be predicted from another document's last token
            if learned.any():
                part = ids[start : start + seq_len]
                pieces.append(Encoded(document, part, learned, piece, over_long, rendered.remarks))
            else:
                reason = NO_LABELS_AFTER_CUT if over_long else EMPTY_ANSWER
                pieces.append(Removed(document.origin, reason, piece, rendered.remarks))
        return pieces


def labels_of(input_ids: np.ndarray, scored: np.ndarray) -> np.ndarray:
    """int32 [tokens]: the ids of scored tokens, and IGNORED elsewhere; not shifted."""
    return np.where(scored, input_ids, np.int32(IGNORED))


def _scored(encoding: Any, text_length: int, spans: list[Span]) -> np.ndarray:
    """Which tokens of a tokenizers.Encoding share a character with a span; bool [tokens].

    Includes tokens that also cover template text, such as the space before the answer, since the model has to write
    them. Looks up tokens at the ends of spans only: fetching the offsets of all tokens is slow.
    """
    scored = np.zeros(len(encoding), dtype=bool)
    for start, end in spans:
        first = _token_from(encoding, start, text_length)
        while first > 0 and _reach(encoding, first - 1) > start:
            first -= 1
        after = _token_from(encoding, end, text_length)
        while after < len(encoding) and encoding.token_to_chars(after)[0] < end:
            after += 1
        while after > first and encoding.token_to_chars(after - 1)[0] >= end:
            after -= 1
        scored[first:after] = True
    return scored


def _token_from(encoding: Any, character: int, text_length: int) -> int:
    """The first token that covers the character or, if none does, the next character that is covered."""
    found = (encoding.char_to_token(at) for at in range(character, text_length))
    return next((token for token in found if token is not None), len(encoding))


def _reach(encoding: Any, token: int) -> int:
    """One past the last character of a token; a token of no width, such as some whitespace, reaches to the next one."""
    start, end = encoding.token_to_chars(token)
    if start == end and token + 1 < len(encoding):
        end = encoding.token_to_chars(token + 1)[0]
    return max(end, start + 1)
