"""The chat templates of today's model families, rebuilt in small: what is learned of every kind of conversation.

Expectations are written by hand: the texts of the assistant turns that are learned, in order, or a refusal.
"""

from pathlib import Path

import pytest

from data_prep.chat import ChatTemplate, Rendered
from data_prep.user_error import UserError
from tests.data_prep.test_chat_templates import LLAMA3, QWEN3, turns
from tests.support.tiny_tokenizer import tiny_tokenizer

TEMPLATES = Path(__file__).parent / "templates"
SPECIALS = {  # the last one is the tokenizer's eos
    "gpt_oss": "<|start|> <|end|> <|message|> <|channel|> <|call|> <|return|>",
    "glm4": "[gMASK] <sop> <|system|> <|user|> <|assistant|> <|observation|> <think> </think> <tool_call> </tool_call> "
    "<arg_key> </arg_key> <arg_value> </arg_value> <tool_response> </tool_response> <|endoftext|>",
    "qwen35": "<|endoftext|> <|im_start|> <think> </think> <tool_call> </tool_call> <tool_response> </tool_response> "
    "<|im_end|>",
    "llama4": "<|begin_of_text|> <|header_start|> <|header_end|> <|python_start|> <|python_end|> <|eot|>",
    "magistral": "<s> [INST] [/INST] [SYSTEM_PROMPT] [/SYSTEM_PROMPT] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] "
    "[TOOL_CALLS] [CALL_ID] [ARGS] [TOOL_RESULTS] [TOOL_CONTENT] [/TOOL_RESULTS] [THINK] [/THINK] </s>",
    "deepseek_v3": "<bos> <|User|> <|Assistant|> <|calls_begin|> <|call_begin|> <|sep|> <|call_end|> <|calls_end|> "
    "<|outputs_begin|> <|output_begin|> <|output_end|> <|outputs_end|> <eos>",
    "deepseek_r1": "<bos> <|User|> <|Assistant|> <think> </think> <|calls_begin|> <|call_begin|> <|sep|> <|call_end|> "
    "<|calls_end|> <|output_begin|> <|output_end|> <eos>",
    "gemma3": "<bos> <start_of_turn> <end_of_turn>",
    "phi4": "<|endoftext|> <|im_start|> <|im_sep|> <|im_end|>",
    "command": "<BOS> <|START_OF_TURN_TOKEN|> <|SYSTEM_TOKEN|> <|USER_TOKEN|> <|CHATBOT_TOKEN|> <|START_THINKING|> "
    "<|END_THINKING|> <|START_ACTION|> <|END_ACTION|> <|START_RESPONSE|> <|END_RESPONSE|> <|START_TOOL_RESULT|> "
    "<|END_TOOL_RESULT|> <|END_OF_TURN_TOKEN|>",
    "granite": "<|start_of_role|> <|end_of_role|> <|tool_call|> <|end_of_text|>",
    "smollm3": "<|begin_of_text|> <|im_start|> <think> </think> <|im_end|>",
    "nemotron": "<s> <SPECIAL_10> <SPECIAL_11> <SPECIAL_12>",
}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def calls(*arguments: dict, content: str | None = None, ids: tuple[str, ...] = (), **fields) -> dict:
    made = [
        {**({"id": ids[i]} if ids else {}), "type": "function", "function": {"name": "add", "arguments": each}}
        for i, each in enumerate(arguments)
    ]
    return {"role": "assistant", "content": content, "tool_calls": made, **fields}


def result(content: str, **fields) -> dict:
    return {"role": "tool", "content": content, **fields}


CONVERSATIONS = {
    "single": turns("user: a", "assistant: b"),
    "multi": turns("system: S", "user: a", "assistant: b", "user: c", "assistant: d"),
    "tools": [*turns("user: a"), calls({"x": 1}), result("5"), *turns("assistant: b", "user: c"), calls({"x": "y"})],
    "parallel": [*turns("user: a"), calls({"x": 1}, {"x": 2}), result("5"), result("6"), *turns("assistant: b")],
    "thinking": [*turns("user: a"), {"role": "assistant", "reasoning_content": "hm", "content": "b"}],
}
NO_CALLS = "leaves out tool calls; use a model whose template writes them"
NO_REASONING = r"leaves out the reasoning of messages\[1\], the last answer"
EXPECTED = {
    "gpt_oss": {
        "single": ["<|channel|>final<|message|>b<|return|>"],
        "multi": ["<|channel|>final<|message|>b<|end|>", "<|channel|>final<|message|>d<|return|>"],
        "tools": [
            ' to=functions.add<|channel|>commentary json<|message|>{"x": 1}<|call|>',
            "<|channel|>final<|message|>b<|end|>",
            ' to=functions.add<|channel|>commentary json<|message|>{"x": "y"}<|call|>',
        ],
        "parallel": NO_CALLS,
        "thinking": [
            "<|channel|>analysis<|message|>hm<|end|><|start|>assistant<|channel|>final<|message|>b<|return|>",
        ],
    },
    "glm4": {
        "single": ["\n<think></think>\nb<|endoftext|>"],
        "multi": ["\n<think></think>\nb<|user|>", "\n<think></think>\nd<|endoftext|>"],
        "tools": [
            "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
            "<|observation|>",
            "\n<think></think>\nb<|user|>",
            "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>y</arg_value>\n</tool_call>"
            "<|endoftext|>",
        ],
        "parallel": [
            "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call>"
            "\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>2</arg_value>\n</tool_call><|observation|>",
            "\n<think></think>\nb<|endoftext|>",
        ],
        "thinking": ["\n<think>hm</think>\nb<|endoftext|>"],
    },
    "qwen3": {
        "single": ["<think>\n\n</think>\n\nb<|im_end|>"],
        "multi": ["b<|im_end|>", "<think>\n\n</think>\n\nd<|im_end|>"],
        "tools": [
            '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>',
            "b<|im_end|>",
            '<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": "y"}}\n</tool_call><|im_end|>',
        ],
        "parallel": [
            '<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n'
            '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>',
            "<think>\n\n</think>\n\nb<|im_end|>",
        ],
        "thinking": ["<think>\nhm\n</think>\n\nb<|im_end|>"],
    },
    "qwen35": {  # the prompt ends with <think>\n
        "single": ["\n</think>\n\nb<|im_end|>"],
        "multi": ["b<|im_end|>", "\n</think>\n\nd<|im_end|>"],
        "tools": [
            "<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call><|im_end|>",
            "b<|im_end|>",
            "\n</think>\n\n<tool_call>\n<function=add>\n<parameter=x>\ny\n</parameter>\n</function>\n</tool_call>"
            "<|im_end|>",
        ],
        "parallel": [
            "\n</think>\n\n<tool_call>\n<function=add>\n<parameter=x>\n1\n</parameter>\n</function>\n</tool_call>\n"
            "<tool_call>\n<function=add>\n<parameter=x>\n2\n</parameter>\n</function>\n</tool_call><|im_end|>",
            "\n</think>\n\nb<|im_end|>",
        ],
        "thinking": ["hm\n</think>\n\nb<|im_end|>"],
    },
    "llama3": {
        "single": ["b<|eot_id|>"],
        "multi": ["b<|eot_id|>", "d<|eot_id|>"],
        "tools": [
            '{"name": "add", "parameters": {"x": 1}}<|eot_id|>',
            "b<|eot_id|>",
            '{"name": "add", "parameters": {"x": "y"}}<|eot_id|>',
        ],
        "parallel": "refuses turns of .*: Only single tool-calls!",
        "thinking": NO_REASONING,
    },
    "llama4": {
        "single": ["b<|eot|>"],
        "multi": ["b<|eot|>", "d<|eot|>"],
        "tools": [
            '{"name": "add", "parameters": {"x": 1}}<|eot|>',
            "b<|eot|>",
            '{"name": "add", "parameters": {"x": "y"}}<|eot|>',
        ],
        "parallel": [
            '{"name": "add", "parameters": {"x": 1}}{"name": "add", "parameters": {"x": 2}}<|eot|>',
            "b<|eot|>",
        ],
        "thinking": NO_REASONING,
    },
    "deepseek_v3": {
        "single": ["b<eos>"],
        "multi": ["b<eos>", "d<eos>"],
        "tools": [
            '<|calls_begin|><|call_begin|>function<|sep|>add\n```json\n{"x": 1}\n```<|call_end|><|calls_end|><eos>',
            "b<eos>",
            '<|calls_begin|><|call_begin|>function<|sep|>add\n```json\n{"x": "y"}\n```<|call_end|><|calls_end|><eos>',
        ],
        "parallel": [
            '<|calls_begin|><|call_begin|>function<|sep|>add\n```json\n{"x": 1}\n```<|call_end|>\n'
            '<|call_begin|>function<|sep|>add\n```json\n{"x": 2}\n```<|call_end|><|calls_end|><eos>',
            "b<eos>",
        ],
        "thinking": NO_REASONING,
    },
    "deepseek_r1": {
        "single": ["b<eos>"],
        "multi": r"leaves out messages\[0\] \(system\)",
        "tools": [
            '<|calls_begin|><|call_begin|>add<|sep|>{"x": 1}<|call_end|><|calls_end|><eos>',
            "b<eos>",
            '<|calls_begin|><|call_begin|>add<|sep|>{"x": "y"}<|call_end|><|calls_end|><eos>',
        ],
        "parallel": [
            '<|calls_begin|><|call_begin|>add<|sep|>{"x": 1}<|call_end|><|call_begin|>add<|sep|>{"x": 2}<|call_end|>'
            "<|calls_end|><eos>",
            "b<eos>",
        ],
        "thinking": NO_REASONING,
    },
    "gemma3": {
        "single": ["b<end_of_turn>"],
        "multi": ["b<end_of_turn>", "d<end_of_turn>"],
        "tools": "refuses turns of .* must alternate",
        "parallel": "refuses turns of .* must alternate",
        "thinking": NO_REASONING,
    },
    "phi4": {
        "single": ["b<|im_end|>"],
        "multi": ["b<|im_end|>", "d<|im_end|>"],
        "tools": NO_CALLS,
        "parallel": NO_CALLS,
        "thinking": NO_REASONING,
    },
    "command": {
        "single": ["<|START_RESPONSE|>b<|END_RESPONSE|><|END_OF_TURN_TOKEN|>"],
        "multi": [
            "<|START_RESPONSE|>b<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            "<|START_RESPONSE|>d<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
        "tools": [
            '<|START_ACTION|>[{"tool_name": "add", "parameters": {"x": 1}}]<|END_ACTION|><|END_OF_TURN_TOKEN|>',
            "<|START_RESPONSE|>b<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
            '<|START_ACTION|>[{"tool_name": "add", "parameters": {"x": "y"}}]<|END_ACTION|><|END_OF_TURN_TOKEN|>',
        ],
        "parallel": [
            '<|START_ACTION|>[{"tool_name": "add", "parameters": {"x": 1}}, {"tool_name": "add", "parameters": '
            '{"x": 2}}]<|END_ACTION|><|END_OF_TURN_TOKEN|>',
            "<|START_RESPONSE|>b<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
        "thinking": [
            "<|START_THINKING|>hm<|END_THINKING|><|START_RESPONSE|>b<|END_RESPONSE|><|END_OF_TURN_TOKEN|>",
        ],
    },
    "granite": {
        "single": ["b<|end_of_text|>"],
        "multi": ["b<|end_of_text|>", "d<|end_of_text|>"],
        "tools": [
            '<|tool_call|>[{"name": "add", "arguments": {"x": 1}}]<|end_of_text|>',
            "b<|end_of_text|>",
            '<|tool_call|>[{"name": "add", "arguments": {"x": "y"}}]<|end_of_text|>',
        ],
        "parallel": [
            '<|tool_call|>[{"name": "add", "arguments": {"x": 1}}, {"name": "add", "arguments": {"x": 2}}]'
            "<|end_of_text|>",
            "b<|end_of_text|>",
        ],
        "thinking": NO_REASONING,
    },
    "smollm3": {
        "single": ["b<|im_end|>"],
        "multi": ["b<|im_end|>", "d<|im_end|>"],
        "tools": [
            '\n<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call><|im_end|>',
            "b<|im_end|>",
            '\n<tool_call>{"name": "add", "arguments": {"x": "y"}}</tool_call><|im_end|>',
        ],
        "parallel": [
            '\n<tool_call>{"name": "add", "arguments": {"x": 1}}</tool_call>'
            '\n<tool_call>{"name": "add", "arguments": {"x": 2}}</tool_call><|im_end|>',
            "b<|im_end|>",
        ],
        "thinking": NO_REASONING,
    },
    "nemotron": {
        "single": ["b\n<SPECIAL_12>"],
        "multi": ["b\n<SPECIAL_12>", "d\n<SPECIAL_12>"],
        "tools": [
            '<TOOLCALL>[{"name": "add", "arguments": {"x": 1}}]</TOOLCALL>\n<SPECIAL_12>',
            "b\n<SPECIAL_12>",
            '<TOOLCALL>[{"name": "add", "arguments": {"x": "y"}}]</TOOLCALL>\n<SPECIAL_12>',
        ],
        "parallel": [
            '<TOOLCALL>[{"name": "add", "arguments": {"x": 1}}, {"name": "add", "arguments": {"x": 2}}]</TOOLCALL>\n'
            "<SPECIAL_12>",
            "b\n<SPECIAL_12>",
        ],
        "thinking": ["hm\n</think>\nb\n<SPECIAL_12>"],
    },
}
STOPS = {
    "gpt_oss": ["<|return|>", "<|end|>", "<|call|>"],
    "glm4": ["<|endoftext|>", "<|user|>", "<|observation|>"],
    "deepseek_v3": ["<eos>"],
    "deepseek_r1": ["<eos>"],
    "llama3": ["<|eot_id|>"],
    "llama4": ["<|eot|>"],
    "gemma3": ["<end_of_turn>"],
    "command": ["<|END_OF_TURN_TOKEN|>"],
    "granite": ["<|end_of_text|>"],
    "nemotron": ["<SPECIAL_12>"],
    "magistral": ["</s>"],
}


def template_of(family: str) -> ChatTemplate:
    if family in ("qwen3", "llama3"):
        return ChatTemplate(tiny_tokenizer(*{"qwen3": QWEN3, "llama3": LLAMA3}[family]))
    specials = tuple(SPECIALS[family].split())
    text = (TEMPLATES / f"{family}.jinja").read_text()
    return ChatTemplate(tiny_tokenizer(text, specials, specials[-1]))


def learned(family: str, messages: list[dict], tools=None) -> list[str]:
    return parts_of(template_of(family).learned(messages, "file.jsonl:7", tools))


def parts_of(found: Rendered) -> list[str]:
    return [found.text[slice(*span)] for spans in found.parts.values() for span in spans]


@pytest.mark.parametrize("kind", CONVERSATIONS)
@pytest.mark.parametrize("family", EXPECTED)
def test_what_is_learned_is_what_the_model_has_to_write(family, kind):
    expected, tools = EXPECTED[family][kind], TOOLS if kind in ("tools", "parallel") else None
    if isinstance(expected, str):
        with pytest.raises(UserError, match=expected):
            learned(family, CONVERSATIONS[kind], tools)
    else:
        assert learned(family, CONVERSATIONS[kind], tools) == expected


def test_a_call_whose_reasoning_the_template_drops_ends_where_one_without_does():
    called = calls({"x": 1}, reasoning_content="hm")
    messages = [*turns("user: a"), called, result("5"), *turns("user: c", "assistant: d")]
    assert learned("glm4", messages) == [
        "\n<think></think>\n<tool_call>add\n<arg_key>x</arg_key>\n<arg_value>1</arg_value>\n</tool_call><|observation|>",
        "\n<think></think>\nd<|endoftext|>",
    ]


@pytest.mark.parametrize("family", [*SPECIALS, "qwen3", "llama3"])
def test_every_learned_turn_ends_with_a_token_that_generation_stops_at(family):
    stops = template_of(family).stop_tokens()
    assert stops == STOPS.get(family, ["<|im_end|>"])
    for messages in CONVERSATIONS.values():
        try:
            assert all(text.endswith(tuple(stops)) for text in learned(family, messages))
        except UserError:
            continue  # as expected above


def test_tokens_that_end_parts_of_a_turn_do_not_stop_a_model_that_reasons():
    assert template_of("gpt_oss").stop_tokens(reasons=True) == ["<|return|>", "<|call|>"]
    assert template_of("qwen35").stop_tokens(reasons=True) == ["<|im_end|>"]
