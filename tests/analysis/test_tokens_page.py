"""The page of colored tokens: whole in itself, and text stays text."""

import re
from html.parser import HTMLParser

import numpy as np

from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.analysis.router_analysis import token_texts
from trainer.analysis.tokens_page import Example, tokens_page

TEXTS = ["<script>", "&amp;", '"quoted"', "\n", "plain"]
WEIGHTS = np.array([[[0.1, 0.9]] * 4 + [[0.6, 0.4]], [[0.8, 0.2]] * 5])  # all layers, layer 0


class Reader(HTMLParser):
    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.texts.append(data)


def page() -> str:
    learned = np.array([False, False, False, True, True])
    return tokens_page("Run <b>", [Example("task & co", TEXTS, learned, WEIGHTS)], ["all layers", "layer 0"])


def test_tokens_carry_their_leading_expert_by_view_and_whether_they_are_learned():
    tokens = [attrs for tag, attrs in Reader(page()).tags if tag == "span" and "data-leads" in attrs]
    assert [token["class"] for token in tokens] == ["e1", "e1", "e1", "e1", "e0"]
    assert [token["data-leads"] for token in tokens] == ["1 0", "1 0", "1 0", "1 0", "0 0"]
    assert ["data-learned" in token for token in tokens] == [False, False, False, True, True]


def test_text_is_escaped_and_comes_back_as_it_was():
    reader = Reader(page())
    assert "".join(TEXTS) in "".join(reader.texts)
    assert {"Run <b>", "task & co"} <= set(reader.texts)
    assert [tag for tag, _ in reader.tags].count("script") == 1


def test_nothing_is_asked_of_the_net():
    assert not re.search(r"https?:|src=|href=|@import|url\(", page())


def test_what_tokens_add_is_the_text_also_where_characters_take_several():
    tokenizer, text = tiny_tokenizer(), "naïve 🙂 日本 the words"
    ids = tokenizer(text)["input_ids"]
    found = token_texts(tokenizer, ids)
    assert len(found) == len(ids)
    assert "".join(found) == text
    assert "🙂" in found and "" in found


def test_a_text_that_ends_within_a_character_says_so():
    tokenizer = tiny_tokenizer()
    assert token_texts(tokenizer, tokenizer("a🙂")["input_ids"][:-1])[-1] == "\ufffd"
