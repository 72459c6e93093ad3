"""Public reports on chat templates: what is learned of conversations that other trainers got wrong."""

import json
import re
from pathlib import Path

import pytest

from data_prep.chat import ChatTemplate
from data_prep.forms import to_document
from data_prep.user_error import UserError
from tests.support.tiny_tokenizer import tiny_tokenizer

CASES = Path(__file__).parent


def template_of(case: str) -> ChatTemplate:
    specials = tuple((CASES / case / "specials.txt").read_text().split())
    return ChatTemplate(tiny_tokenizer((CASES / case / "template.jinja").read_text(), specials, specials[-1]))


def learned(case: str) -> list[list[str]]:
    """What is learned of each row, turn by turn."""
    template, rows = template_of(case), []
    for number, line in enumerate((CASES / case / "rows.jsonl").read_text().splitlines(), 1):
        document = to_document(json.loads(line), "task", f"rows.jsonl:{number}")
        found = template.learned(document.messages, document.origin, document.tools)
        rows.append([found.text[slice(*span)] for spans in found.parts.values() for span in spans])
    return rows


def test_gpt_oss_calls_end_with_the_token_that_the_template_writes_after_them():
    case = "03-gpt-oss-ends-a-call-with-another-token"
    called = ' to=functions.get_weather<|channel|>commentary json<|message|>{"city": "Oslo"}<|call|>'
    thought = "<|channel|>analysis<|message|>I look it up.<|end|><|start|>assistant"
    assert learned(case) == [
        ["<|channel|>final<|message|>Rain.<|end|>", "<|channel|>final<|message|>Sun.<|return|>"],
        [called, "<|channel|>final<|message|>Rain.<|return|>"],
        [called],
        [thought + called, "<|channel|>final<|message|>Rain.<|return|>"],
    ]
    assert template_of(case).learned_ends() == ["<|return|>", "<|end|>", "<|call|>"]


def test_glm_turns_end_with_the_next_role_and_the_last_with_the_end_token():
    case = "04-glm-ends-a-turn-with-the-next-role"
    called = "\n<tool_call>get_weather\n<arg_key>city</arg_key>\n<arg_value>Oslo</arg_value>\n</tool_call>"
    assert learned(case) == [
        ["\nRain.<|user|>", "\nSun.<|endoftext|>"],
        [called + "<|observation|>", "\nRain.<|endoftext|>"],
        [called + "<|endoftext|>"],
    ]
    assert template_of(case).learned_ends() == ["<|endoftext|>", "<|user|>", "<|observation|>"]


def test_a_template_that_joins_arguments_as_text_gets_text_and_null_for_no_content():
    called = '<|calls|>get_weather\n```json\n{"city": "Oslo"}\n```<|end|><eos>'
    assert learned("17-templates-that-want-arguments-as-text") == [
        [called, "Rain.<eos>"],
        [called, "Rain.<eos>"],
        ["Let me see." + called, "Rain.<eos>"],
    ]


def test_a_turn_is_found_where_the_template_refuses_the_turns_before_it():
    greeted = ["Hello, what do you need?<|im_end|>", "Hi<|im_end|>"]
    assert learned("19-template-that-refuses-a-prefix") == [greeted, greeted]


def agent_trace(count: int) -> list[dict]:
    turns = [{"role": "user", "content": "go"}]
    for index in range(count):
        call = {"type": "function", "function": {"name": "run", "arguments": {"cmd": f"ls {index}"}}}
        turns += [
            {"role": "assistant", "content": "x" * 200, "tool_calls": [call]},
            {"role": "tool", "content": "y" * 400},
        ]
    return [*turns, {"role": "assistant", "content": "done"}]


def test_long_agent_traces_render_a_few_beginnings_however_long_they_are(monkeypatch):
    template = template_of("03-gpt-oss-ends-a-call-with-another-token")
    template.learned_ends()  # renders conversations of its own
    write, written = template._renderer.text, []
    monkeypatch.setattr(template._renderer, "text", lambda *a, **named: written.append(1) or write(*a, **named))
    counts = []
    for length in (40, 400):
        written.clear()
        text, spans = template.render(agent_trace(length), "trace.jsonl:1")
        counts.append(len(written))
        called = [text[slice(*span)] for span in spans.values()][:-1]
        prefix = " to=functions.run<|channel|>commentary json<|message|>"
        assert called == [f'{prefix}{{"cmd": "ls {index}"}}<|call|>' for index in range(length)]
    assert counts[0] == counts[1] <= 6


def test_a_refused_system_turn_in_the_middle_is_told_with_a_remedy():
    with pytest.raises(UserError) as caught:
        learned("48-system-turn-in-the-middle")
    assert str(caught.value) == (
        "rows.jsonl:1: the tokenizer's chat template refuses turns of user, assistant, system, user, assistant: System "
        "message must be at the beginning.; correct the conversation, for example make messages[2] (system) a user turn"
    )


def test_the_learned_ends_of_every_case_are_special_tokens():
    for case in CASES.glob("*/template.jinja"):
        ends = template_of(case.parent.name).learned_ends()
        assert ends and all(re.fullmatch(r"<\S+>", end) for end in ends)
