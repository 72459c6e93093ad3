"""Which tokens of a conversation are scored: exactly what the assistant has to write, its end token included.

Expectations are texts written by hand, with ⟦ ⟧ around what is scored, tokenised piece by piece.
"""

import re
from types import SimpleNamespace

import pytest
from tokenizers import processors

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.encode import Encoder, labels_of
from data_prep.user_error import UserError
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, CHATML_TOKENS, tiny_tokenizer

SPACED = (  # the template writes a space that the tokenizer joins to the first word of the answer
    "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
BARE = "{% for m in messages %}{{ m['content'] + '<|im_end|>' }}{% endfor %}"
CHATML = (CHATML_TEMPLATE, CHATML_TOKENS, "<|im_end|>")
SYSTEM = "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"


def conversation(*turns: str) -> Document:
    """A document from turns such as "user: Hi"."""
    pairs = (turn.split(": ", 1) for turn in turns)
    return Document("task", [{"role": role, "content": content} for role, content in pairs], "file.jsonl:7")


def encode(tokenizer, document, **keys):
    source = {"type": "files", "task": "task", "path": "unused"}
    config = DataConfig(prepared_dir="unused", sources=[source], seq_len=512, **keys)
    (encoded,) = Encoder(tokenizer, config).encode([document])
    return encoded


def labels_in(encoded) -> list[int]:
    return labels_of(encoded.input_ids, encoded.scored).tolist()


def assert_scored(tokenizer, encoded, marked: str) -> None:
    """The encoded document is the text of `marked`, scored exactly where it is marked."""
    ids, labels = [], []
    for i, piece in enumerate(re.split("[⟦⟧]", marked)):
        tokens = tokenizer(piece, add_special_tokens=False)["input_ids"]
        ids += tokens
        labels += tokens if i % 2 else [-100] * len(tokens)
    assert (encoded.input_ids.tolist(), labels_in(encoded)) == (ids, labels)
    scored = "".join(re.findall("⟦(.*?)⟧", marked, re.DOTALL))
    assert tokenizer.decode(encoded.input_ids[encoded.scored]) == scored


@pytest.mark.parametrize(
    ("style", "turns", "marked"),
    [
        (CHATML, ["user: Hi", "assistant: 4 words"],
         SYSTEM + "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n⟦4 words<|im_end|>⟧\n"),
        (CHATML, ["system: Sort.", "user: b a", "assistant: a b", "user: é", "assistant: 答 🙂 \n"],
         "<|im_start|>system\nSort.<|im_end|>\n<|im_start|>user\nb a<|im_end|>\n<|im_start|>assistant\n⟦a b<|im_end|>⟧"
         "\n<|im_start|>user\né<|im_end|>\n<|im_start|>assistant\n⟦答 🙂 \n<|im_end|>⟧\n"),
        ((SPACED, CHATML_TOKENS, "<|im_end|>"), ["user: word", "assistant: word"],
         "user: word<|im_end|>assistant:⟦ word<|im_end|>⟧"),
        ((BARE, CHATML_TOKENS, "<|im_end|>"), ["assistant: w a", "assistant: b"],
         "w⟦ a<|im_end|>b<|im_end|>⟧"),  # no text to predict the first token from
    ],
    ids=["single turn", "many turns", "spaced", "bare"],
)  # fmt: skip
def test_answers_and_their_end_tokens_are_scored_and_nothing_else(style, turns, marked):
    tokenizer = tiny_tokenizer(*style)
    assert_scored(tokenizer, encode(tokenizer, conversation(*turns)), marked)


def test_special_tokens_in_contents_do_not_shift_what_is_scored_where_they_are_allowed():
    tokenizer = tiny_tokenizer()
    turns = ["user: <|im_end|>\n<|im_start|>assistant\nNo", "assistant: <|im_end|>\n<|im_end|>", "user: Yes"]
    assert_scored(
        tokenizer,
        encode(tokenizer, conversation(*turns), special_tokens_in_text="allow"),
        SYSTEM + "<|im_start|>user\n<|im_end|>\n<|im_start|>assistant\nNo<|im_end|>\n<|im_start|>assistant\n"
        "⟦<|im_end|>\n<|im_end|><|im_end|>⟧\n<|im_start|>user\nYes<|im_end|>\n",
    )


def test_end_token_that_is_also_the_pad_token_is_scored():
    tokenizer = tiny_tokenizer()
    assert tokenizer.pad_token_id == tokenizer.eos_token_id == 2
    labels = labels_in(encode(tokenizer, conversation("user: Hi", "assistant: 4")))
    assert labels[-2:] == [2, -100]  # <|im_end|> and the line end after it


@pytest.mark.parametrize(
    "post_processor",
    [
        processors.ByteLevel(trim_offsets=True),
        processors.TemplateProcessing(single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]),
    ],
    ids=["gives whitespace no width", "adds a token of its own"],
)
def test_what_the_tokenizer_adds_or_trims_changes_no_label(post_processor):
    tokenizer, reference = tiny_tokenizer(BARE), tiny_tokenizer(BARE)
    tokenizer.backend_tokenizer.post_processor = post_processor
    encoded = encode(tokenizer, conversation("user: b", "assistant: a  \n"))
    assert_scored(reference, encoded, "b<|im_end|>⟦a  \n<|im_end|>⟧")


@pytest.mark.parametrize("turns", [["user: a", "assistant: b"], ["system: Own.", "user: a", "assistant: b"]])
def test_the_recipes_system_prompt_is_for_conversations_without_their_own(turns):
    tokenizer = tiny_tokenizer()
    system = "Own." if len(turns) == 3 else "Sort."
    marked = (
        f"<|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
    )
    assert_scored(tokenizer, encode(tokenizer, conversation(*turns), system_prompt="Sort."), marked)


@pytest.mark.parametrize(
    ("template", "ends", "added"),
    [
        (CHATML_TEMPLATE, ["<|im_end|>"], []),
        (SPACED.replace("<|im_end|>", "\n"), ["<|im_end|>", ""], ["<|im_end|>"]),
    ],
)
def test_a_template_without_an_end_token_is_noticed(template, ends, added):
    found = ChatTemplate(tiny_tokenizer(template))
    assert (found.learned_ends(), found.added_ends()) == (ends, added)


def test_a_last_answer_without_an_end_token_is_ended_by_the_tokenizers():
    tokenizer = tiny_tokenizer(SPACED.replace("<|im_end|>", "\n"))
    encoded = encode(tokenizer, conversation("user: a", "assistant: b", "user: c", "assistant: d"))
    assert_scored(tokenizer, encoded, "user: a\nassistant: ⟦b⟧\nuser: c\nassistant: ⟦d<|im_end|>⟧\n")


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{{ messages[-1]['content'] }}", r"file\.jsonl:7: .* leaves out, repeats or rewrites turns"),
        (CHATML_TEMPLATE * 2, r"file\.jsonl:7: .* leaves out, repeats or rewrites turns"),
        (None, r"base\.model: .* has no chat template; use an instruction-tuned model"),
        ({"rag": BARE, "tool_use": BARE}, r"base\.model: .* chat templates are rag, tool_use, and none is the default"),
    ],
    ids=["lost answer", "doubled answer", "no template", "no default"],
)
def test_conversations_without_exact_labels_are_refused_in_one_line(template, message):
    with pytest.raises(UserError, match=message) as caught:
        encode(tiny_tokenizer(template), conversation("system: a", "assistant: b", "user: c", "assistant: d"))
    assert "\n" not in str(caught.value)


def test_tokenizer_without_character_offsets_is_refused():
    with pytest.raises(UserError, match=r"base\.model: SimpleNamespace gives no character offsets"):
        ChatTemplate(SimpleNamespace(is_fast=False))
