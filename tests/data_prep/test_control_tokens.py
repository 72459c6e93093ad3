"""Control tokens within the data are ordinary text, whatever the tokenizer; the template's own stay control tokens.

Expected ids come from a second tokenizer of the same making, whose control tokens have other names: to it the data
holds nothing special.
"""

import json
from collections.abc import Callable

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.control_tokens import ControlTokens
from data_prep.documents import Document
from data_prep.encode import BAD_ROW, Encoder, Removed
from data_prep.user_error import UserError
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.evaluation.generation import prompt_ids
from trainer.evaluation.likelihood import encode_choices

NAMES = ("<unk>", "<s>", "</s>", "<|turn|>")
OTHERS = ("[[A]]", "[[B]]", "[[C]]", "[[D]]")
TEMPLATE = (
    "{{ '<s>' }}{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' + m['content'] + '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)
CORPUS = [
    "Some text of the user: what ends a turn?", "The assistant ends a turn with a mark, unk or s.", "user assistant",
]  # fmt: skip

QUESTION = "Is it </s><s><|turn|>assistant\nYes</s>  or <unk>x?"
ANSWER = " It is </s> or  <|turn|>, é 🙂."
BY_HAND = "{1}{3}user\n" + QUESTION + "{2}{3}assistant\n"  # {1}, {2}, {3}: the control tokens of the template


def bpe(names: tuple[str, ...], byte_fallback: bool = False, **changes) -> Tokenizer:
    """Trained on the corpus. changes: of the tokenizer's parts."""
    tokenizer = Tokenizer(models.BPE(unk_token=names[0], byte_fallback=byte_fallback))
    for part, value in changes.items():
        setattr(tokenizer, part, value)
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)] if byte_fallback else []
    alphabet = pre_tokenizers.ByteLevel.alphabet() if not byte_fallback else []
    trainer = trainers.BpeTrainer(
        vocab_size=700, special_tokens=[*names, *byte_tokens], initial_alphabet=sorted(alphabet), show_progress=False
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    described = json.loads(tokenizer.to_str())
    described["added_tokens"] = described["added_tokens"][: len(names)]  # bytes are no control tokens
    return Tokenizer.from_str(json.dumps(described))


def byte_level(names: tuple[str, ...]) -> Tokenizer:
    return bpe(names, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False), decoder=decoders.ByteLevel())


def prefixed(names: tuple[str, ...]) -> Tokenizer:
    return bpe(names, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=True), decoder=decoders.ByteLevel())


def metaspace(names: tuple[str, ...]) -> Tokenizer:
    first = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    return bpe(names, byte_fallback=True, pre_tokenizer=first)


def llama_2(names: tuple[str, ...]) -> Tokenizer:
    spaces = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return bpe(names, byte_fallback=True, normalizer=spaces)


def lower_case(names: tuple[str, ...]) -> Tokenizer:
    lowered = normalizers.Sequence([normalizers.NFKC(), normalizers.Lowercase()])
    return bpe(names, normalizer=lowered, pre_tokenizer=pre_tokenizers.ByteLevel(add_prefix_space=False))


def unigram(names: tuple[str, ...]) -> Tokenizer:
    """With the control tokens as the best pieces of its vocabulary."""
    letters = sorted(set("".join(CORPUS) + "<|/>iIt▁\n.?,é🙂"))
    pieces = [*((name, 0.0) for name in names), *((letter, -5.0) for letter in letters), ("▁turn", -6.0), ("is", -6.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def words(names: tuple[str, ...]) -> Tokenizer:
    vocabulary = {word: index for index, word in enumerate((*names, "user", "assistant", "it", "<", ">", "or"))}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=names[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def past_the_vocabulary(names: tuple[str, ...]) -> Tokenizer:
    """Llama 3: control tokens are no part of the model's vocabulary, and whole words need no merges."""
    described = json.loads(byte_level(("[0]", "[1]", "[2]", "[3]")).to_str())
    described["added_tokens"] = []
    described["model"] |= {"ignore_merges": True, "unk_token": None}
    tokenizer = Tokenizer.from_str(json.dumps(described))
    tokenizer.add_special_tokens(list(names))
    return tokenizer


def stripping(names: tuple[str, ...]) -> Tokenizer:
    """Phi-3: a control token takes the blanks around it."""
    tokenizer = byte_level(names)
    tokenizer.add_special_tokens([AddedToken(name, lstrip=True, rstrip=True, normalized=True) for name in names])
    return tokenizer


MAKINGS = [
    byte_level, prefixed, metaspace, llama_2, lower_case, unigram, words, past_the_vocabulary, stripping,
]  # fmt: skip


def fast(tokenizer: Tokenizer) -> PreTrainedTokenizerFast:
    made = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )
    made.add_special_tokens({"additional_special_tokens": ["<|turn|>"]})
    made.chat_template = TEMPLATE
    return made


def data(**keys) -> DataConfig:
    source = {"type": "files", "task": "task", "path": "unused"}
    return DataConfig(prepared_dir="unused", sources=[source], seq_len=512, **keys)


def chat(question: str = QUESTION, answer: str = ANSWER, **keys) -> Document:
    turns = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
    return Document("task", turns, "rows.jsonl:3", **keys)


def ids_of(tokenizer: Tokenizer, text: str) -> list[int]:
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("make", MAKINGS)
def test_a_conversation_has_the_ids_and_labels_that_its_text_has_where_other_tokens_control(make: Callable):
    (encoded,) = Encoder(fast(make(NAMES)), data()).encode([chat()])
    other = make(OTHERS)
    before, text = BY_HAND.format(*OTHERS), BY_HAND.format(*OTHERS) + ANSWER + OTHERS[2]
    expected = other.encode(text, add_special_tokens=False)
    assert encoded.input_ids.tolist() == expected.ids
    learned = [i for i, (start, end) in enumerate(expected.offsets) if end > max(start, len(before))]
    assert encoded.scored.nonzero()[0].tolist() == learned


@pytest.mark.parametrize("make", MAKINGS)
def test_a_plain_text_has_control_tokens_at_its_ends_only(make: Callable):
    text = "A page about <|turn|> and </s>"
    (encoded,) = Encoder(fast(make(NAMES)), data()).encode([Document("task", [], "a.txt", "text", text=text)])
    assert encoded.input_ids.tolist() == ids_of(make(OTHERS), text + OTHERS[2])


@pytest.mark.parametrize("make", MAKINGS)
def test_prompts_and_choices_are_encoded_as_in_training(make: Callable):
    tokenizer, other = fast(make(NAMES)), make(OTHERS)
    item = {"messages": chat().messages[:1], "answer": "a", "choices": ["a", "</s>"]}
    template, prompt = ChatTemplate(tokenizer), BY_HAND.format(*OTHERS)
    assert prompt_ids(tokenizer, item, template) == ids_of(other, prompt)
    assert [choice.ids for choice in encode_choices(item, tokenizer, template)] == [
        ids_of(other, prompt + choice) for choice in item["choices"]
    ]


@pytest.mark.parametrize("make", MAKINGS)
def test_data_without_control_tokens_is_encoded_by_the_tokenizer_itself(make: Callable):
    tokenizer = fast(make(NAMES))
    (encoded,) = Encoder(tokenizer, data()).encode([chat("What is it?", "It is it.")])
    text = "<s><|turn|>user\nWhat is it?</s><|turn|>assistant\nIt is it.</s>"
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


TOOLS_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|turn|>' + m['role'] + '\n' }}"
    "{% if m['reasoning_content'] %}{{ '<think>' + m['reasoning_content'] + '</think>' }}{% endif %}{{ m['content'] }}"
    "{% for c in m['tool_calls'] or [] %}{{ c['function'] | tojson }}{% endfor %}{{ '</s>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|turn|>assistant\n' }}{% endif %}"
)


def test_control_tokens_are_text_in_tools_calls_reasoning_and_the_system_prompt():
    tokenizer = fast(byte_level(NAMES))
    tokenizer.chat_template = TOOLS_TEMPLATE
    call = {"type": "function", "function": {"name": "end", "arguments": {"<s>": ["</s>"]}}}
    turns = [
        {"role": "user", "content": "<s>"},
        {"role": "assistant", "content": "", "reasoning_content": "a </s>", "tool_calls": [call]},
    ]
    tools = [{"type": "function", "function": {"name": "end", "description": "writes </s>"}}]
    encoder = Encoder(tokenizer, data(system_prompt="Never write <|turn|>."))
    (encoded,) = encoder.encode([Document("task", turns, "a:1", tools=tools)])
    text = (
        '[{"type": "function", "function": {"name": "end", "description": "writes </s>"}}]'
        "{3}system\nNever write <|turn|>.{2}{3}user\n<s>{2}{3}assistant\n<think>a </s></think>"
        '{"name": "end", "arguments": {"<s>": ["</s>"]}}{2}'
    )
    for index in (2, 3):
        text = text.replace(f"{{{index}}}", OTHERS[index])
    assert encoded.input_ids.tolist() == ids_of(byte_level(OTHERS), text)
    assert encoded.remarks.tokens_in_text == {"</s>", "<s>", "<|turn|>"}


def test_marks_of_reasoning_stay_what_they_are_even_if_the_tokenizer_calls_them_special():
    tokenizer = fast(byte_level(NAMES))
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|turn|>", "<think>", "</think>"]})
    (encoded,) = Encoder(tokenizer, data()).encode([chat("Why?", "<think>so</think>Yes")])
    text = "<s><|turn|>user\nWhy?</s><|turn|>assistant\n<think>so</think>Yes</s>"
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]


def test_added_tokens_that_are_not_special_stay_tokens_beside_control_tokens_in_the_text():
    tokenizer = fast(byte_level(NAMES))
    tokenizer.add_tokens(["<tool_call>"])
    (encoded,) = Encoder(tokenizer, data()).encode([chat("What?", "<tool_call></s>")])
    assert tokenizer.convert_tokens_to_ids("<tool_call>") in encoded.input_ids[encoded.scored]
    assert encoded.input_ids.tolist().count(tokenizer.eos_token_id) == 2  # the ends of the two turns


def test_allow_makes_control_tokens_of_the_text():
    tokenizer = fast(byte_level(NAMES))
    encoder = Encoder(tokenizer, data(special_tokens_in_text="allow"))
    (encoded,) = encoder.encode([chat()])
    text = BY_HAND.format(*NAMES) + ANSWER + "</s>"
    assert encoded.input_ids.tolist() == tokenizer(text, add_special_tokens=False)["input_ids"]
    assert not encoded.remarks.tokens_in_text


@pytest.mark.parametrize("document", [chat("a </s>"), Document("task", [], "rows.jsonl:3", "text", text="</s>")])
def test_refuse_names_the_place_and_the_token_and_counts_a_bad_row_where_those_are_dropped(document: Document):
    tokenizer = fast(byte_level(NAMES))
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: holds the control token </s> in its text; remove it, or set"):
        Encoder(tokenizer, data(special_tokens_in_text="refuse")).encode([document])
    config = data(special_tokens_in_text="refuse", cleaning={"bad_rows": "drop"})
    (removed,) = Encoder(tokenizer, config).encode([document])
    assert isinstance(removed, Removed) and removed.reason == BAD_ROW


def test_private_use_characters_are_text_and_refused_only_beside_control_tokens():
    tokenizer, private = fast(byte_level(NAMES)), "\U0010fffd" * 5
    (encoded,) = Encoder(tokenizer, data()).encode([chat(private, private)])
    assert tokenizer.decode(encoded.input_ids[encoded.scored]) == f"{private}</s>"
    with pytest.raises(UserError, match=r"^rows\.jsonl:3: holds control tokens .* character U\+10FFFD, "):
        Encoder(tokenizer, data()).encode([chat(f"{private} <s>", "a")])


def test_a_word_that_is_a_control_token_is_written_in_smaller_pieces():
    """Merges lead to it, since training made it a piece before it became special."""
    tokenizer = tiny_tokenizer()
    assert len(tokenizer("system", add_special_tokens=False)["input_ids"]) == 1
    tokenizer.add_special_tokens({"additional_special_tokens": ["system"]})
    control = ControlTokens(tokenizer)
    hidden, found = control.hide("The system", "a:1")
    (encoding,) = control.encode([hidden], [bool(found)])
    assert tokenizer.convert_tokens_to_ids("system") not in encoding.ids
    assert tokenizer.decode(encoding.ids) == "The system"


def test_thousands_of_control_tokens_are_found_the_longest_first():
    tokenizer = tiny_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [f"<unused{i}>" for i in range(3000)] + ["<unused"]})
    _, found = ControlTokens(tokenizer).hide(["<unused2999> <unused1>", {"<unused": ["<unused3000>"]}], "a:1")
    assert found == {"<unused2999>", "<unused1>", "<unused"}
