"""Conversations with tools: calls are scored with their turn's end token, their results are not.

Expectations are texts written by hand, with ⟦ ⟧ around what is scored.
"""

import pytest

from data_prep.chat import ChatTemplate
from data_prep.user_error import UserError
from tests.data_prep.test_chat_templates import (
    GEMMA,
    LLAMA3,
    MISTRAL,
    OPEN_THINKING,
    PHI3,
    QWEN3,
    SMOLLM2,
    marked,
    turns,
)
from tests.support.tiny_tokenizer import tiny_tokenizer

TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {}}}]
TOOLS_TEXT = '{"type": "function", "function": {"name": "add", "parameters": {}}}'
HERMES = (  # ChatML with calls, as Qwen2.5's
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + (m.content or '') }}"
    "{% for call in m.tool_calls or [] %}{{ '\n<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}",
    *SMOLLM2[1:],
)

OPEN_END = (HERMES[0].replace("<|im_end|>\n", "\n"), *HERMES[1:])


def call(name="add", **arguments) -> dict:
    return {"id": "123456789", "type": "function", "function": {"name": name, "arguments": arguments}}


def calls(*made: dict, **fields) -> dict:
    return {"role": "assistant", "tool_calls": list(made), **fields}


def result(content: str) -> dict:
    return {"role": "tool", "name": "add", "tool_call_id": "123456789", "content": content}


@pytest.mark.parametrize(
    ("style", "messages", "tools", "expected"),
    [
        (QWEN3, [*turns("system: S", "user: a"), calls(call(x=1), call(x=2)), result("1"), result("2"),
                 *turns("assistant: b", "user: c", "assistant: d")], TOOLS,
         f"<|im_start|>system\nS\n\nTools:\n{TOOLS_TEXT}<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
         '⟦<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call>\n'
         '<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>⟧\n'
         "<|im_start|>user\n<tool_response>\n1\n</tool_response>\n<tool_response>\n2\n</tool_response><|im_end|>\n"
         "<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧\n"),
        (QWEN3, [*turns("user: a"), calls(call(x=1), content="Let me add."), result("1"), calls(call(x=2), content="")],
         None,
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
         '⟦Let me add.\n<tool_call>\n{"name": "add", "arguments": {"x": 1}}\n</tool_call><|im_end|>⟧\n'
         "<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
         '⟦<think>\n\n</think>\n\n<tool_call>\n{"name": "add", "arguments": {"x": 2}}\n</tool_call><|im_end|>⟧\n'),
        (QWEN3, [*turns("user: a"), calls(call(), content="<think>\nadd?\n</think>\n\n"), result("1"),
                 *turns("assistant: b", "user: c"), calls(call(), reasoning_content="add!"), result("2"),
                 *turns("assistant: d")], None,
         '<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦<tool_call>\n{"name": "add", "arguments": {}}\n'
         "</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n1\n</tool_response><|im_end|>\n<|im_start|>assistant\n"
         "⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦<think>\nadd!\n</think>\n\n"
         '<tool_call>\n{"name": "add", "arguments": {}}\n</tool_call><|im_end|>⟧\n'
         "<|im_start|>user\n<tool_response>\n2\n</tool_response><|im_end|>\n"
         "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧\n"),
        (QWEN3, [*turns("user: <<turn:1>>"),
                 calls(call(x="<|im_end|>\n<|im_start|>", y={"<<turn:0>>": ["{}}", "⟪\"\\"]}), content="<|im_end|>"),
                 result("<|im_end|>"), *turns("assistant: <<turn_:1>>")], None,
         "<|im_start|>user\n<<turn:1>><|im_end|>\n<|im_start|>assistant\n⟦<|im_end|>\n<tool_call>\n"
         '{"name": "add", "arguments": {"x": "<|im_end|>\\n<|im_start|>", "y": {"<<turn:0>>": ["{}}", "⟪\\"\\\\"]}}'
         "}\n</tool_call><|im_end|>⟧\n<|im_start|>user\n<tool_response>\n<|im_end|>\n</tool_response><|im_end|>\n"
         "<|im_start|>assistant\n⟦<think>\n\n</think>\n\n<<turn_:1>><|im_end|>⟧\n"),
        (HERMES, [*turns("user: a"), calls(call(), content=None), calls(call("<|im_end|>"), content=" b"),
                  *turns("user: a")], [],
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n"
         '⟦\n<tool_call>{"name": "add", "arguments": {}}</tool_call><|im_end|>⟧\n<|im_start|>assistant\n'
         '⟦ b\n<tool_call>{"name": "<|im_end|>", "arguments": {}}</tool_call><|im_end|>⟧\n'
         "<|im_start|>user\na<|im_end|>\n"),
        (HERMES, [calls(call()), result("1")], None,
         '<|im_start|>assistant\n⟦\n<tool_call>{"name": "add", "arguments": {}}</tool_call><|im_end|>⟧\n'
         "<|im_start|>tool\n1<|im_end|>\n"),
        (OPEN_THINKING, [*turns("user: a"), calls(call(), content=""), result("1"),
                         calls(call(), content="<think>\nr</think>")], None,
         "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n<think></think>"
         '⟦{"name": "add", "arguments": {}}<|im_end|>⟧\n<|im_start|>tool\n1<|im_end|>\n'
         '<|im_start|>assistant\n<think>\n⟦r</think>{"name": "add", "arguments": {}}<|im_end|>⟧\n'),
        (LLAMA3, [*turns("user: a\n"), calls(call(x="<|eot_id|>"), content="not written"), result('{"y": "1\n"}'),
                  *turns("assistant: b ")], TOOLS,
         f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nFunctions: [{TOOLS_TEXT}]\na<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n"
         '⟦{"name": "add", "parameters": {"x": "<|eot_id|>"}}<|eot_id|>⟧'
         '<|start_header_id|>ipython<|end_header_id|>\n\n"{\\"y\\": \\"1\\n\\"}"<|eot_id|>'
         "<|start_header_id|>assistant<|end_header_id|>\n\n⟦b<|eot_id|>⟧"),
        (MISTRAL, [*turns("user: a"), calls(call(), call("mul", x="</s>")), result("</s>"), result("2"),
                   *turns("assistant: b", "user: c"), calls(call(), content="")], TOOLS,
         '<s>[INST] a[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "123456789"}, '
         '{"name": "mul", "arguments": {"x": "</s>"}, "id": "123456789"}]</s>⟧'
         '[TOOL_RESULTS] {"content": </s>, "call_id": "123456789"}[/TOOL_RESULTS]'
         '[TOOL_RESULTS] {"content": 2, "call_id": "123456789"}[/TOOL_RESULTS]⟦ b</s>⟧'
         f"[AVAILABLE_TOOLS] [{TOOLS_TEXT}][/AVAILABLE_TOOLS][INST] c[/INST]"
         '⟦[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "123456789"}]</s>⟧'),
        (MISTRAL, [*turns("user: a"), calls(call()), *turns("user: b", "assistant: c")], [{"name": "</s><<turn:0>>"}],
         '<s>[INST] a[/INST]⟦[TOOL_CALLS] [{"name": "add", "arguments": {}, "id": "123456789"}]</s>⟧'
         '[AVAILABLE_TOOLS] [{"name": "</s><<turn:0>>"}][/AVAILABLE_TOOLS][INST] b[/INST]⟦ c</s>⟧'),
        (MISTRAL, turns("user: a", "assistant: b"), [], "<s>[INST] a[/INST]⟦ b</s>⟧"),
        (OPEN_END, [*turns("user: a"), calls(call()), result("1"), calls(call())], None,
         '<|im_start|>user\na\n<|im_start|>assistant\n⟦\n<tool_call>{"name": "add", "arguments": {}}</tool_call>\n'
         "<|im_start|>⟧tool\n1\n<|im_start|>assistant\n"
         '⟦\n<tool_call>{"name": "add", "arguments": {}}</tool_call><|im_end|>⟧\n'),
        (SMOLLM2, turns("system: S", "user: a", "assistant: b"), TOOLS,
         "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"),
    ],
    ids=["qwen3 two calls and results", "qwen3 content and call", "qwen3 reasoning", "qwen3 end tokens and markers",
         "calls in consecutive turns", "calls first", "prompt opens a thought", "llama3", "mistral",
         "mistral question after call", "mistral no tools", "no end token", "smollm2 takes no tools"],
)  # fmt: skip
def test_calls_are_scored_with_their_end_token_and_results_are_not(style, messages, tools, expected):
    assert marked(style, messages, tools) == expected


NO_CONTENT = (OPEN_THINKING[0].replace("m.content }}", "m.content if not m.tool_calls }}"), *OPEN_THINKING[1:])


THINKS_WITH_TOOLS = (
    "{% set thought = '<think>\n' if tools else '' %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + thought + m.content + '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + thought }}{% endif %}"
)


def test_prompts_of_other_conversations_do_not_mislead():
    template = ChatTemplate(tiny_tokenizer(THINKS_WITH_TOOLS))
    for tools in (None, TOOLS):
        text, spans = template.render(turns("user: a", "assistant: b"), "file.jsonl:7", tools)
        assert text[slice(*spans[1])] == "b<|im_end|>"
    template = ChatTemplate(tiny_tokenizer(*MISTRAL))
    for identity in ("123456789", "987654321"):
        called = calls({**call(), "id": identity})
        messages = [*turns("user: a"), called, {**result("1"), "tool_call_id": identity}, *turns("assistant: b")]
        text, spans = template.render(messages, "file.jsonl:7")
        assert text[slice(*spans[3])] == " b</s>"


TWO_TURNS = (HERMES[0].replace("<tool_call>", "<|im_end|>\n<tool_call>"), *HERMES[1:])
TEXT_ARGUMENTS = (HERMES[0].replace("call.function | tojson", "call.function.arguments"), *HERMES[1:])


@pytest.mark.parametrize(
    ("style", "messages", "message"),
    [
        (SMOLLM2, [*turns("user: a"), calls(call())], r"leaves out tool calls; use a model"),
        (SMOLLM2, [*turns("user: a"), calls(call(), content="Let me add.")],
         r"leaves out tool calls; use a model whose template writes them, or write them as content"),
        (GEMMA, [*turns("user: a"), calls(call(), content="add")], r"leaves out tool calls; use a model"),
        (GEMMA, [*turns("user: a"), calls(call(), content=""), result("1")], r"refuses turns of .* must alternate"),
        (PHI3, [*turns("user: a"), calls(call(), content="")], r"leaves out tool calls; use a model"),
        (PHI3, [*turns("user: a"), calls(call(), content=""), result("1")], r"leaves out messages\[2\] \(tool\)"),
        (LLAMA3, [*turns("user: a"), calls(call(), call())], r"refuses turns of user, assistant: Only single tool"),
        (TEXT_ARGUMENTS, [*turns("user: a"), calls(call())], r"leaves out tool calls; use a model"),
        (NO_CONTENT, [*turns("user: a"), calls(call(), content="")], r"leaves out, repeats or rewrites turns"),
        (TWO_TURNS, [*turns("user: a"), calls(call())], r"leaves out, repeats or rewrites turns"),
    ],
    ids=["smollm2 needs content", "smollm2", "gemma", "gemma results", "phi3", "phi3 results", "llama3 two calls",
         "arguments and no name", "begins anyhow", "a turn in two"],
)  # fmt: skip
def test_calls_that_cannot_be_found_exactly_are_refused_in_one_line(style, messages, message):
    with pytest.raises(UserError, match=rf"^file\.jsonl:7: the tokenizer's chat template {message}") as caught:
        marked(style, messages)
    assert "\n" not in str(caught.value)
