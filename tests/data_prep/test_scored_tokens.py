"""Which tokens a span covers: found from the ends of the span, compared with a search over all tokens."""

import random

import pytest
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

from data_prep.encode import _scored
from tests.support.tiny_tokenizer import tiny_tokenizer

PIECES = ["word", " ", "  ", "\n", "\t", "<|im_end|>", "é", "答", "🙂", "a", "the sum", "\u00a0", "e\u0301", ""]


def byte_level(trim: bool) -> Tokenizer:
    tokenizer = tiny_tokenizer().backend_tokenizer
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=trim)
    return tokenizer


def sentencepiece_like() -> Tokenizer:
    """Characters after a metaspace, as Llama-2's and Gemma's tokenizers mark words; composes letters."""
    alphabet = {character: i for i, character in enumerate("▁abdehmorstuw\né答🙂\t")}
    tokenizer = Tokenizer(models.BPE({**alphabet, "<unk>": len(alphabet)}, [], unk_token="<unk>"))
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="never")
    return tokenizer


def words_only() -> Tokenizer:
    """White space belongs to no token at all."""
    tokenizer = Tokenizer(models.WordLevel({"word": 0, "a": 1, "the": 2, "<unk>": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return tokenizer


def overlaps(offsets: list[tuple[int, int]], start: int, end: int) -> list[bool]:
    """By looking at every token; one without a width is its next neighbour's."""
    reach = [b if b > a else offsets[i + 1][0] if i + 1 < len(offsets) else a for i, (a, b) in enumerate(offsets)]
    return [a < end and max(b, a + 1) > start for (a, _), b in zip(offsets, reach, strict=True)]


@pytest.mark.parametrize(
    "tokenizer",
    [byte_level(False), byte_level(True), sentencepiece_like(), words_only()],
    ids=["byte level", "byte level, trimmed", "metaspace", "words only"],
)
def test_spans_cover_the_tokens_that_share_a_character_with_them(tokenizer):
    chance = random.Random(0)
    for _ in range(2000):
        text = "".join(chance.choices(PIECES, k=chance.randint(1, 12)))
        start, end = sorted(chance.choices(range(len(text) + 1), k=2))
        if start == end:
            continue
        encoding = tokenizer.encode(text, add_special_tokens=False)
        wanted = overlaps(encoding.offsets, start, end)
        assert _scored(encoding, len(text), [(start, end)]).tolist() == wanted, (text, start, end, encoding.offsets)
