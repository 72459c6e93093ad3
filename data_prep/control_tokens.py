"""Keeps control tokens apart from equal text in the data.

Tokenizers take `<|im_end|>` for the control token wherever it stands, so a question could contain a forged turn and an
answer an early end. In data that holds such text, stand-ins hide it from the chat template: private-use characters, as
many as the token has, so that all character positions stay valid. In the rendered text the two are then swapped: the
stand-ins become the text again, and the template's own tokens become stand-ins. A copy of the tokenizer that knows its
control tokens by these names only encodes the result.
"""

import json
import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

from tokenizers import Encoding, Tokenizer

from data_prep.documents import END_OF_REASONING
from data_prep.user_error import UserError

_LAST_PRIVATE = 0x10FFFD  # the last private-use character; hardly any text holds those at the end of the range
_MARKUP = ("<think>", END_OF_REASONING)  # how data sets mark reasoning within an answer; never text


class ControlTokens:
    """The special tokens of one tokenizer, and the encoding of texts that hold them as ordinary text.

    policy: data.special_tokens_in_text. Added tokens that are not special, such as <tool_call>, are not concerned.
    """

    def __init__(self, tokenizer: Any, policy: str = "encode_as_text"):
        self._backend: Tokenizer = tokenizer.backend_tokenizer
        self._backend.no_truncation()
        self._backend.no_padding()
        self._refuses = policy == "refuse"
        added = self._backend.get_added_tokens_decoder()
        special = [t.content for _, t in sorted(added.items()) if t.special and t.content and t.content not in _MARKUP]
        self._stand_ins = {token: chr(_LAST_PRIVATE - i) * len(token) for i, token in enumerate(special)}
        self._pattern = re.compile(_any_of(special)) if special and policy != "allow" else None

    def hide(self, value: Any, origin: str) -> tuple[Any, frozenset[str]]:
        """A JSON value with stand-ins for the control tokens in its strings, and the tokens found.

        Raises UserError, naming `origin`, if there are any and the policy refuses them.
        """
        found = frozenset(self._find(value))
        if not found:
            return value, found
        if self._refuses:
            raise UserError(
                f"{origin}: holds the control token {min(found)} in its text; remove it, or set "
                "data.special_tokens_in_text: encode_as_text"
            )
        return self._hidden(value, origin), found

    def encode(self, texts: Sequence[str], hiding: Sequence[bool]) -> list[Encoding]:
        """The encodings of rendered texts, without further special tokens. hiding: whether a text holds stand-ins."""
        plain = [text for text, hides in zip(texts, hiding, strict=True) if not hides]
        swapped = [self._swap(text) for text, hides in zip(texts, hiding, strict=True) if hides]
        ordinary = iter(self._backend.encode_batch(plain, add_special_tokens=False))
        others = iter(self._renamed.encode_batch(swapped, add_special_tokens=False) if swapped else ())
        return [next(others if hides else ordinary) for hides in hiding]

    def _find(self, value: Any) -> list[str]:
        if self._pattern is None:
            return []
        return self._pattern.findall("\0".join(_strings(value)))  # one search of all, since it saves time

    def _hidden(self, value: Any, origin: str) -> Any:
        if isinstance(value, str):
            if found := self._private.search(value):
                raise UserError(
                    f"{origin}: holds control tokens in its text and also the private-use character "
                    f"U+{ord(found[0]):X}, which is needed to encode them as text; remove one of the two"
                )
            assert self._pattern is not None  # a token has been found
            return self._pattern.sub(lambda match: self._stand_ins[match[0]], value)
        if isinstance(value, dict):
            return {self._hidden(key, origin): self._hidden(part, origin) for key, part in value.items()}
        return [self._hidden(part, origin) for part in value] if isinstance(value, list | tuple) else value

    @cached_property
    def _private(self) -> re.Pattern[str]:
        return re.compile(f"[{chr(_LAST_PRIVATE - len(self._stand_ins) + 1)}-{chr(_LAST_PRIVATE)}]")

    def _swap(self, text: str) -> str:
        pattern, other = self._swaps
        return pattern.sub(lambda match: other[match[0]], text)

    @cached_property
    def _swaps(self) -> tuple[re.Pattern[str], dict[str, str]]:
        """Matches tokens and stand-ins, and gives for each the other."""
        other = {**self._stand_ins, **{stand_in: token for token, stand_in in self._stand_ins.items()}}
        return re.compile(_any_of(other)), other

    @cached_property
    def _renamed(self) -> Tokenizer:
        """A copy of the tokenizer that has stand-ins for the names of control tokens, with the same ids.

        Their own names are then unknown to it: not even the model's vocabulary holds them, where Unigram would find
        them, and no merges lead to them.
        """
        described = json.loads(self._backend.to_str())
        model, name = described["model"], self._stand_ins
        for token in described["added_tokens"]:
            token["content"] = name.get(token["content"], token["content"])
        if isinstance(model["vocab"], dict):
            model["vocab"] = {name.get(piece, piece): index for piece, index in model["vocab"].items()}
        else:  # Unigram: pieces with their scores
            model["vocab"] = [[name.get(piece, piece), score] for piece, score in model["vocab"]]
        if model.get("unk_token") in name:
            model["unk_token"] = name[model["unk_token"]]
        if "merges" in model:
            model["merges"] = [merge for merge in model["merges"] if not name.keys() & _pieces(merge)]
        renamed = Tokenizer.from_str(json.dumps(described, ensure_ascii=False))
        for token, stand_in in name.items():
            if renamed.token_to_id(stand_in) != self._backend.token_to_id(token):
                raise UserError(
                    f"data.special_tokens_in_text: this tokenizer cannot encode {token} as text; set it to refuse, and "
                    "data.cleaning.bad_rows: drop to leave such rows out"
                )
        return renamed


def _pieces(merge: str | list[str]) -> set[str]:
    """The two pieces of a BPE merge, and what it makes of them."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return {first, second, first + second}


def _any_of(words: Iterable[str]) -> str:
    """A regular expression for the longest of these words that fits.

    Ordered by common beginnings: some tokenizers have thousands of special tokens, and trying each is slow.
    """
    rests: dict[str, list[str]] = {}
    for word in words:
        rests.setdefault(word[:1], []).append(word[1:])
    branches = [re.escape(first) + _any_of(rest) for first, rest in rests.items() if first]
    if len(branches) == 1 and "" not in rests:
        return branches[0]
    return f"(?:{'|'.join(branches)})" + ("?" if "" in rests else "") if branches else ""


def _strings(value: Any) -> list[str]:
    """The strings in a JSON value, keys too, in no order."""
    strings, parts = [], [value]
    while parts:
        part = parts.pop()
        if isinstance(part, str):
            strings.append(part)
        elif isinstance(part, dict):
            parts += part
            parts += part.values()
        elif isinstance(part, list | tuple):
            parts += part
    return strings
