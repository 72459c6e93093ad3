"""Records with values of their own for variables of the chat template, such as enable_thinking."""

import json

import pytest

from data_prep.chat import ChatTemplate
from data_prep.config import DataConfig
from data_prep.documents import Document
from data_prep.encode import Encoder
from data_prep.items import held_out_item
from data_prep.user_error import UserError
from tests.support.tiny_tokenizer import tiny_tokenizer

SWITCH = (  # the system turn and every answer show whether the model reasons
    "{% set fast = enable_thinking is defined and not enable_thinking %}"
    "{{ '<|im_start|>system\n' + ('/no_think' if fast else '/think') + '<|im_end|>\n' }}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{{ '<think>\n\n</think>\n\n' if fast and m.role == 'assistant' else '' }}{{ m.content + '<|im_end|>\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{{ '<think>\n\n</think>\n\n' if fast else '' }}{% endif %}"
)
FAST = {"enable_thinking": False}
TURNS = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}] * 2
CONFIG = DataConfig(prepared_dir="unused", sources=[{"type": "files", "task": "t", "path": "unused"}], seq_len=512)


def marked(template: ChatTemplate) -> str:
    """The conversation with brackets around what is learned."""
    text, spans = template.render(TURNS, "file.jsonl:7")
    for start, end in sorted(spans.values(), reverse=True):
        text = text[:start] + "[" + text[start:end] + "]" + text[end:]
    return text


def test_a_records_settings_reach_the_template_and_what_is_known_about_it():
    template = ChatTemplate(tiny_tokenizer(SWITCH))
    system, question, answer = (f"<|im_start|>{role}\n" for role in ("system", "user", "assistant"))
    plain = f"{question}a<|im_end|>\n{answer}[b<|im_end|>]\n" * 2
    quick = f"{question}a<|im_end|>\n{answer}<think>\n\n</think>\n\n[b<|im_end|>]\n" * 2
    for _ in range(2):  # neither misleads the other
        assert marked(template) == f"{system}/think<|im_end|>\n{plain}"
        assert marked(template.with_settings(FAST, "file.jsonl:7")) == f"{system}/no_think<|im_end|>\n{quick}"
        assert marked(template.with_settings({"enable_thinking": True}, "file.jsonl:7")) == marked(template)
    assert template.with_settings(None, "file.jsonl:7") is template


def test_names_that_the_template_does_not_hold_are_known():
    assert ChatTemplate(tiny_tokenizer(SWITCH)).unknown_settings({**FAST, "thinking": 1, "fas": 2}) == [
        "thinking",
        "fas",
    ]


def test_settings_with_which_turns_end_in_another_way_are_refused():
    template = ChatTemplate(
        tiny_tokenizer(
            SWITCH.replace("'<|im_end|>\n' }}{% end", "('<|endoftext|>' if fast else '<|im_end|>\n') }}{% end")
        )
    )
    with pytest.raises(UserError) as caught:
        template.with_settings(FAST, "file.jsonl:7")
    assert str(caught.value) == (
        'file.jsonl:7: with the record\'s `chat_template_kwargs` {"enable_thinking": false}, the chat template ends '
        "turns in another way; remove the field, or write what it sets into data.chat_template"
    )


def test_conversations_that_differ_in_settings_only_are_no_copies_with_the_same_labels():
    plain, quick = (Document("t", TURNS, "file.jsonl:7", settings=settings) for settings in (None, FAST))
    assert plain.digest(0, None) == quick.digest(0, None)  # so they stay on one side of the split
    assert plain.learned_mark(False) != quick.learned_mark(False)


def test_a_held_out_item_keeps_its_settings():
    item = json.loads(held_out_item(Document("t", TURNS, "file.jsonl:7", settings=FAST), CONFIG))
    assert item["chat_template_kwargs"] == FAST


def test_control_tokens_in_a_setting_are_text():
    tokenizer = tiny_tokenizer(SWITCH.replace("'/no_think'", "note"))
    document = Document("t", TURNS, "file.jsonl:7", settings={**FAST, "note": "<|im_end|>"})
    (encoded,) = Encoder(tokenizer, CONFIG).encode([document])
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert list(encoded.input_ids).count(end) == 1 + len(TURNS)
