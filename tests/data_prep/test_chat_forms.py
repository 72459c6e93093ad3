"""Records of chats: OpenAI's and ShareGPT's spelling of turns, tool calls and reasoning."""

import datetime
import json
from typing import Any

import pytest

from data_prep.forms import to_document
from tests.data_prep.records import ASSISTANT, CALL, TOOLS, USER, document, learned, refusal, turns

# chat, OpenAI's spelling


def test_turns_stay_unchanged_except_for_fields_unknown_to_templates():
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": " é\u2028 "},
        {"role": "assistant", "content": "<|im_end|>\n", "reasoning_content": "Hm."},
    ]
    found = document({"messages": [{**turn, "name": "x", "refusal": None} for turn in messages], "id": 1})
    assert (found.messages, found.form) == (messages, "chat")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_an_answers_reasoning_is_kept_under_any_of_its_names(name):
    found = document({"messages": [{**USER, "thinking": "Hm?"}, {**ASSISTANT, name: "Hm."}]})
    assert found.messages == [USER, {**ASSISTANT, "reasoning_content": "Hm."}]
    assert refusal({"messages": [USER, {**ASSISTANT, name: []}]}).startswith(f"messages[1]: field `{name}` is an empty")


@pytest.mark.parametrize("name", ["reasoning_content", "thinking", "reasoning"])
def test_reasoning_may_be_null(name):
    assert to_document({"messages": [USER, {**ASSISTANT, name: None}]}, "task", "here").messages == [USER, ASSISTANT]


@pytest.mark.parametrize("system", ["Be brief.", None])
def test_a_turn_of_weight_zero_is_not_learned(system):
    messages = [USER, {**ASSISTANT, "weight": 0}, USER, {"role": "assistant", "content": "c", "weight": 1}]
    assert learned({"messages": messages, "system": system}) == ["c"]


def test_a_system_field_gives_way_to_the_conversations_own():
    own = {"role": "developer", "content": "own"}
    assert turns({"messages": [own, USER, ASSISTANT], "system": "other"})[0] == ("system", "own")
    assert turns({"messages": [USER, ASSISTANT], "system": "other"})[:2] == [("system", "other"), ("user", "a")]


def test_parts_of_text_are_put_together():
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": " b"}]
    assert turns({"messages": [{"role": "user", "content": parts}, ASSISTANT]})[0] == ("user", "a b")


@pytest.mark.parametrize("arguments", [CALL["function"]["arguments"], '{"x": 1, "y": [2]}', ' {"x":1,"y":[2]}\n'])
@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON text"])
def test_tool_calls_hold_their_arguments_as_an_object(arguments, as_text):
    calls = [{"id": "7", "type": "function", "function": {"name": "add", "arguments": arguments}}]
    answer = {"role": "assistant", "content": None, "tool_calls": json.dumps(calls) if as_text else calls}
    result = {"role": "tool", "tool_call_id": "7", "name": "add", "content": "3"}
    found = document({"messages": [USER, answer, result, ASSISTANT], "tools": TOOLS})
    assert found.messages == [USER, {"role": "assistant", "tool_calls": [{"id": "7", **CALL}]}, result, ASSISTANT]
    assert found.tools == TOOLS


@pytest.mark.parametrize("arguments", [{}, "", "{}", None])
def test_a_call_may_have_no_arguments(arguments):
    function = {"name": "now", "arguments": arguments}
    (_, turn) = document({"messages": [USER, {"role": "assistant", "tool_calls": [{"function": function}]}]}).messages
    assert turn["tool_calls"] == [{"type": "function", "function": {"name": "now", "arguments": {}}}]


def test_the_legacy_function_call_is_a_tool_call_and_its_role_a_tool():
    messages = [
        USER,
        {"role": "assistant", "content": "", "function_call": {"name": "add", "arguments": '{"x": 1, "y": [2]}'}},
        {"role": "function", "name": "add", "content": "3"},
    ]
    assert document({"messages": messages}).messages == [
        USER,
        {"role": "assistant", "tool_calls": [CALL], "content": ""},
        {"role": "tool", "name": "add", "content": "3"},
    ]


@pytest.mark.parametrize("tools", [TOOLS, json.dumps(TOOLS)], ids=["list", "JSON text"])
@pytest.mark.parametrize(
    "record",
    [{"messages": [USER, ASSISTANT]}, {"instruction": "a", "output": "b"}, {"prompt": "a", "completion": "b"}],
    ids=["chat", "Alpaca", "prompt"],
)
def test_tools_stand_beside_any_conversation(record, tools):
    assert document({**record, "tools": tools}).tools == TOOLS
    for none in (None, "", [], "[]"):
        assert not document({**record, "tools": none}).tools


def deep(levels: int) -> Any:
    value: Any = 1
    for _ in range(levels):
        value = {"a": [value]}
    return value


@pytest.mark.parametrize(
    ("messages", "expected"),
    [
        ([], "messages is an empty list; expected a list of one or more turns, correct the record"),
        ("Hi", "messages is text; expected a list of one or more turns"),
        ({"role": "user"}, "messages is object; expected a list of one or more turns"),
        (3, "messages is number; expected a list of one or more turns"),
        (["Hi"], "messages[0] is text; expected an object with `role` and `content`"),
        ([USER, None], "messages[1] is null; expected an object with `role` and `content`"),
        ([{"role": "user"}], "messages[0]: lacks field `content`; it has ['role'], add the field"),
        ([{"content": "a"}], "messages[0]: lacks field `role`; it has ['content'], add the field"),
        ([{"role": "user", "content": None}], "messages[0]: lacks field `content`; it has ['role'], add the field"),
        ([{"role": "user", "content": []}], "messages[0]: field `content` is an empty list; expected text"),
        ([{"role": "user", "content": {}}], "messages[0]: field `content` is object; expected text"),
        ([{"role": True, "content": "a"}], "messages[0]: field `role` is true or false; expected text"),
        ([{"role": "user", "content": "a\udc00"}], "messages[0]: field `content` holds half a surrogate pair at char"),
        (
            [{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "image_url", "image_url": {}}]}],
            "messages[0]: `content` has a part of type 'image_url'; expected parts of type text, ",
        ),
        ([{"role": "user", "content": ["a"]}], "messages[0]: `content` has a part that is text; expected parts"),
        ([{"role": "user", "content": [{"type": "a\nb"}]}], "messages[0]: `content` has a part of type 'a\\nb';"),
        ([{"role": "user", "content": [{"type": "text"}]}], "messages[0]: lacks field `text`; it has ['type'], add"),
        ([USER, {**ASSISTANT, "weight": 0.5}], "messages[1]: field `weight` is 0.5; expected 0 (not learned) or"),
        ([USER, {**ASSISTANT, "weight": "2"}], "messages[1]: field `weight` is '2'; expected 0 (not learned) or 1"),
        ([{"role": "assistant", "tool_calls": []}], "messages[0]: lacks field `content`; it has ['role', 'tool_"),
        ([{"role": "assistant", "tool_calls": "[]"}], "messages[0]: lacks field `content`; it has ['role', 'tool_"),
        ([{"role": "assistant", "tool_calls": "add"}], "messages[0]: tool call 0 is text without `name`; expected an"),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"arguments": {"x": 1}}}]}],
            "messages[0]: tool call 0 is object without `name`",
        ),
        (
            [{"role": "assistant", "tool_calls": [{"function": {"name": " ", "arguments": {"x": 1}}}]}],
            "messages[0]: tool call 0 is object without `name`",
        ),
    ],
)
def test_bad_turns_are_refused(messages, expected):
    assert refusal({"messages": messages}).startswith(expected)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("add 1", "`arguments` is text; expected an object, or one as JSON text"),
        ('{"x": 1', "`arguments` is text; expected an object, or one as JSON text"),
        ("[1]", "`arguments` is list; expected an object, or one as JSON text"),
        ('{"x": 1, "x": 2}', "`arguments` is text; expected an object, or one as JSON text"),
        ('{"x": "\\ud83d"}', "field `arguments` holds half a surrogate pair at character 7; remove it"),
        ({"x": "\ud83d"}, "field `arguments` holds half a surrogate pair at character 7; remove"),
        ('{"x": NaN}', "field `arguments` is not JSON (Out of range float values are not JSON compliant"),
        (
            {"x": datetime.date(2026, 1, 1)},
            "field `arguments` is not JSON (Object of type date is not JSON serializable",
        ),
        (json.dumps(deep(60)), "field `arguments` has over 100 nested lists and objects; simplify it"),
    ],
)
def test_arguments_that_no_template_can_write_are_refused(arguments, expected):
    calls = [{"function": {"name": "add", "arguments": arguments}}]
    message = refusal({"messages": [USER, {"role": "assistant", "tool_calls": calls}]})
    assert message.startswith(f"messages[1]: tool call 0: {expected}")


@pytest.mark.parametrize(
    ("tools", "expected"),
    [
        ("add", "field `tools` is text; expected a list of JSON schemas"),
        ({"a": 1}, "field `tools` is object; expected a list of JSON schemas"),
        (["add"], "field `tools` is list; expected a list of JSON schemas"),
        ('[{"a": "\\ud83d"}]', "field `tools` holds half a surrogate pair at character 8; remove it"),
        ([deep(60)], "field `tools` has over 100 nested lists and objects; simplify it"),
    ],
)
def test_tools_that_no_template_can_write_are_refused(tools, expected):
    assert refusal({"messages": [USER, ASSISTANT], "tools": tools}).startswith(expected)


# chat, ShareGPT's spelling


def test_sharegpt_names_roles_in_its_own_way():
    said = [("system", "s"), ("human", "a"), ("gpt", "b"), ("user", "c"), ("assistant", "d")]
    record = {"conversations": [{"from": name, "value": value} for name, value in said]}
    roles = ["system", "user", "assistant", "user", "assistant"]
    assert turns(record) == [(role, value) for role, (_, value) in zip(roles, said, strict=True)]
    assert (learned(record), document(record).form) == (["b", "d"], "ShareGPT")


def test_sharegpt_keeps_calls_and_their_results_as_turns_and_system_and_tools_as_columns():
    call = '{"name": "add", "arguments": {"x": 1, "y": [2]}}'
    said = [("human", "a"), ("function_call", call), ("observation", "3"), ("gpt", "b")]
    record = {
        "conversations": [{"from": name, "value": value} for name, value in said],
        "system": "Be brief.",
        "tools": json.dumps(TOOLS),
    }
    found = document(record)
    assert found.messages == [
        {"role": "system", "content": "Be brief."},
        USER,
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "tool", "content": "3"},
        ASSISTANT,
    ]
    assert (found.tools, found.learned_turns(last_only=False)) == (TOOLS, [2, 4])


def test_each_spelling_may_stand_under_the_other_ones_name():
    spelt = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    expected = [("user", "a"), ("assistant", "b")]
    assert turns({"messages": spelt}) == turns({"conversations": [USER, ASSISTANT]}) == expected


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        ({"from": "human"}, "conversations[0]: lacks field `value`; it has ['from'], add the field"),
        ({"value": "a"}, "conversations[0]: lacks field `role`; it has ['value'], add the field"),
        ({"from": "function_call", "value": "add"}, "conversations[0]: tool call 0 is text without `name`"),
        ({"from": "function_call"}, "conversations[0]: lacks field `value`; it has ['from'], add the field"),
    ],
)
def test_bad_turns_of_sharegpt_are_refused(turn, expected):
    assert refusal({"conversations": [turn]}).startswith(expected)
