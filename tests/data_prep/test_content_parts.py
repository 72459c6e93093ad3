"""Contents that are lists of parts: Anthropic's calls, results and reasoning among texts."""

import pytest

from tests.data_prep.records import ASSISTANT, USER, document, refusal

TEXT = {"type": "text", "text": "Let me see."}
THOUGHT = {"type": "thinking", "thinking": "Rain?", "signature": "EqQB"}
USE = {"type": "tool_use", "id": "toolu_1", "name": "get_weather", "input": {"city": "Oslo"}}
OTHER_USE = {**USE, "id": "toolu_2", "input": {"city": "Bergen"}}
RESULT = {"type": "tool_result", "tool_use_id": "toolu_1", "content": "rain"}
OTHER_RESULT = {"type": "tool_result", "tool_use_id": "toolu_2", "content": [{"type": "text", "text": "sun"}]}


def call(identity: str, city: str) -> dict:
    return {"id": identity, "type": "function", "function": {"name": "get_weather", "arguments": {"city": city}}}


def assistant(*parts: dict) -> dict:
    return {"role": "assistant", "content": [*parts]}


def user(*parts: dict) -> dict:
    return {"role": "user", "content": [*parts]}


def test_calls_and_results_among_parts_are_read_as_openai_writes_them():
    found = document({"messages": [USER, assistant(TEXT, USE), user(RESULT), ASSISTANT]})
    assert found.messages == [
        USER,
        {"role": "assistant", "content": "Let me see.", "tool_calls": [call("toolu_1", "Oslo")]},
        {"role": "tool", "content": "rain", "tool_call_id": "toolu_1"},
        ASSISTANT,
    ]
    assert (found.learned_turns(last_only=False), found.unread) == ([1, 3], ())


def test_results_follow_the_order_of_parallel_calls_and_text_after_them_stays_there():
    asks = {"type": "text", "text": "And tomorrow?"}
    found = document({"messages": [USER, assistant(USE, OTHER_USE), user(OTHER_RESULT, RESULT, asks), ASSISTANT]})
    assert found.messages[1:5] == [
        {"role": "assistant", "tool_calls": [call("toolu_1", "Oslo"), call("toolu_2", "Bergen")]},
        {"role": "tool", "content": "rain", "tool_call_id": "toolu_1"},
        {"role": "tool", "content": "sun", "tool_call_id": "toolu_2"},
        {"role": "user", "content": "And tomorrow?"},
    ]


def test_reasoning_among_parts_is_the_turns_reasoning():
    (_, turn) = document({"messages": [USER, assistant(THOUGHT, TEXT)]}).messages
    assert turn == {"role": "assistant", "content": "Let me see.", "reasoning_content": "Rain?"}
    magistral = {"type": "thinking", "thinking": [{"type": "text", "text": "Rain?"}]}
    assert document({"messages": [USER, assistant(magistral, TEXT)]}).messages[1] == turn


def test_an_empty_result_and_nulls_of_a_table_are_no_parts_of_their_own():
    nulls = dict.fromkeys(("text", "id", "name", "input"))
    result = {**nulls, "type": "tool_result", "tool_use_id": "toolu_1", "content": None}
    found = document({"messages": [USER, assistant({**dict.fromkeys(RESULT), **USE}), user(result)]})
    assert found.messages[2] == {"role": "tool", "content": "", "tool_call_id": "toolu_1"}
    assert found.unread == ()


def test_the_same_call_may_stand_in_a_field_too_as_langchain_writes_it():
    named = [{"name": "get_weather", "args": {"city": "Oslo"}, "id": "toolu_1", "type": "tool_call"}]
    twice = {**assistant(TEXT, USE), "tool_calls": named}
    assert document({"messages": [USER, twice]}).messages[1]["tool_calls"] == [call("toolu_1", "Oslo")]
    assert refusal({"messages": [USER, {**assistant(OTHER_USE), "tool_calls": named}]}) == (
        "messages[1]: `tool_calls` differs between the turn and the parts of its content; keep one of the two"
    )


def test_fields_of_parts_that_are_not_read_are_named():
    failed = {**RESULT, "is_error": True, "cache_control": {"type": "ephemeral"}}
    found = document({"messages": [USER, assistant(THOUGHT, USE), user(failed)]})
    names = ("cache_control", "is_error", "signature")
    assert found.unread == tuple(f"field {name} of content parts" for name in names)


@pytest.mark.parametrize(
    ("turn", "expected"),
    [
        (
            assistant(USE, TEXT),
            "messages[1]: a part of type 'text' after one of type 'tool_use'; expected thinking, then text, then "
            "calls, correct or remove the record",
        ),
        (assistant(TEXT, THOUGHT), "messages[1]: a part of type 'thinking' after one of type 'text'; expected"),
        (assistant(RESULT), "messages[1]: a part of type 'tool_result' in a turn of assistant; expected user turns"),
        (user(USE), "messages[1]: a part of type 'tool_use' in a turn of user; expected assistant turns"),
        (user({**RESULT, "content": [USE]}), "messages[1]: a part of type 'tool_use' in `content` of a part; expected"),
        (user({**RESULT, "content": {"a": 1}}), "messages[1]: field `content` is object; expected text"),
        (user({"type": "tool_result", "stdout": "a"}), "messages[1]: lacks field `content`; it has ['stdout', 'type']"),
        (assistant({"type": "redacted_thinking", "data": "x"}), "messages[1]: `content` has a part of type 'redacted_"),
        (assistant({"type": "tool_use", "id": "a"}), "messages[1]: tool call 0 is object without `name`"),
    ],
)
def test_parts_that_no_turn_can_be_made_of_are_refused(turn, expected):
    assert refusal({"messages": [USER, turn]}).startswith(expected)


def test_a_result_of_an_unknown_call_is_refused():
    wrong = {**RESULT, "tool_use_id": "toolu_9"}
    assert refusal({"messages": [USER, assistant(USE), user(wrong)]}).startswith(
        "messages[2]: `tool_call_id` is 'toolu_9', but no call before it has this `id`"
    )
