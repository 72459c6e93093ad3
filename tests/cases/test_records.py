"""Nothing that a record says is dropped without a word."""

from pathlib import Path

import pytest

from data_prep.user_error import UserError
from tests.data_prep.reading import read, rows_of
from tests.data_prep.records import ASSISTANT, USER, document, refusal

CASES = Path(__file__).parent
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Oslo"}}}


def test_turns_whose_flag_says_so_are_not_learned():
    documents = read(CASES / "01-loss-flag-of-a-turn" / "rows.jsonl")
    assert [found.learned_turns(last_only=False) for found in documents] == [[3], [3], [3]]


def test_call_arguments_are_taken_under_their_other_names():
    documents = read(CASES / "02-call-arguments-under-another-name" / "rows.jsonl")
    calls = [found.messages[1]["tool_calls"] for found in documents]
    assert calls == [[CALL], [{"id": "a1", **CALL}], [CALL]]


def test_a_turn_of_role_tool_call_is_an_answer_with_a_call():
    (found,) = read(CASES / "08-role-tool_call" / "rows.jsonl")
    assert found.messages[1:3] == [{"role": "assistant", "tool_calls": [CALL]}, {"role": "tool", "content": "rain"}]
    assert found.learned_turns(last_only=False) == [1, 3]


def test_a_system_prompt_in_a_column_is_the_first_turn():
    documents = read(CASES / "10-system-prompt-column" / "rows.jsonl")
    assert [found.messages[0] for found in documents] == [{"role": "system", "content": "Answer in Norwegian."}] * 3
    assert not any(isinstance(row, UserError) for row in rows_of(CASES / "10-system-prompt-column" / "rows.jsonl"))


@pytest.mark.parametrize(
    ("flag", "learned"),
    [
        ({"mask": True}, []),
        ({"masked": False}, [1]),
        ({"Trainable": "No"}, []),
        ({"loss_mask": 0}, []),
        ({"weight": "0"}, []),
        ({"loss": "1.0"}, [1]),
        ({"train": "off"}, []),
        ({"mask": "ON"}, []),
    ],
)
def test_flags_are_read_in_any_spelling(flag, learned):
    assert document({"messages": [USER, {**ASSISTANT, **flag}]}).learned_turns(last_only=False) == learned


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"weight": 1, "train": False}, "messages[1]: fields `weight` and `train` contradict each other; remove one"),
        ({"train_detail": [1]}, "messages[1]: field `train_detail` may say what is learned; expected `weight`"),
        ({"mask": 0.5}, "messages[1]: field `mask` is 0.5; expected 1 (not learned) or 0, correct it"),
        ({"skip": True}, "messages[1]: field `skip` may say what is learned; expected `weight`, 0 (not learned) or 1"),
        ({"is_excluded": "yes"}, "messages[1]: field `is_excluded` may say what is learned; expected `weight`, 0"),
        ({"ignore": 1}, "messages[1]: field `ignore` may say what is learned; expected `weight`, 0"),
        ({"include": False}, "messages[1]: field `include` may say what is learned; expected `weight`, 0"),
        ({"prefix": True}, "messages[1]: field `prefix` may say what is learned; expected `weight`, 0"),
    ],
)
def test_flags_of_uncertain_meaning_are_refused(flags, expected):
    assert refusal({"messages": [USER, {**ASSISTANT, **flags}]}).startswith(expected)


@pytest.mark.parametrize("field", [{"skip": False}, {"include": True}, {"prefix": "Dr."}, {"target": "de"}])
def test_fields_that_leave_no_answer_out_are_named_only(field):
    found = document({"messages": [USER, {**ASSISTANT, **field}]})
    assert found.learned_turns(last_only=False) == [1]
    assert found.unread == (f"field {next(iter(field))} of turns",)


def test_what_is_not_read_is_named():
    found = document({"lang": "no", "id": 0, "messages": [{**USER, "name": "x", "train": True}, ASSISTANT], "a": None})
    assert set(found.unread) == {"column lang", "column id", "field name of turns", "flag train of user turns"}


def test_results_follow_the_order_of_their_calls_and_unknown_ids_are_refused():
    calls = {"role": "assistant", "tool_calls": [{"id": i, **CALL} for i in ("p", "q")]}
    results = [{"role": "tool", "tool_call_id": i, "content": i} for i in ("q", "p")]
    found = document({"messages": [USER, calls, *results, ASSISTANT]})
    assert [turn["content"] for turn in found.messages[2:4]] == ["p", "q"]
    wrong = {**results[0], "tool_call_id": "r"}
    assert refusal({"messages": [USER, calls, wrong]}).startswith("messages[2]: `tool_call_id` is 'r', but no call")
    assert refusal({"messages": [USER, results[0], calls]}).startswith("messages[1]: `tool_call_id` is 'q', but no")


@pytest.mark.parametrize(
    ("results", "expected"),
    [
        ([{"id": "q"}, {}], [1, 0]),  # what has no id takes the place that is left
        ([{}, {"id": "q"}], [0, 1]),
        ([{"id": "p"}, {}], [0, 1]),
        ([{"name": "second"}, {"name": "first"}], [1, 0]),
        ([{"name": "second"}, {}], [1, 0]),
        ([{"name": "other"}, {"name": "first"}], [1, 0]),
        ([{"id": "q"}, {"id": "p"}, {"id": "q"}], [1, 0, 2]),
        ([{}, {}, {}], [0, 1, 2]),
    ],
)
@pytest.mark.parametrize("in_one_turn", [True, False])
def test_results_without_an_id_are_matched_by_name_or_by_what_is_left(results, expected, in_one_turn):
    calls = [
        {"id": i, "type": "function", "function": {"name": name, "arguments": {}}}
        for i, name in (("p", "first"), ("q", "second"))
    ]
    turns = [{"role": "assistant", "tool_calls": each} for each in ([calls] if in_one_turn else [calls[:1], calls[1:]])]
    given = [
        {"role": "tool", "content": str(number), **{{"id": "tool_call_id"}.get(k, k): v for k, v in result.items()}}
        for number, result in enumerate(results)
    ]
    found = document({"messages": [USER, *turns, *given, ASSISTANT]}).messages
    assert [int(turn["content"]) for turn in found if turn["role"] == "tool"] == expected


def test_a_call_whose_fields_are_all_null_is_none():
    blank = {"tool_calls": [{"id": None, "function": {"name": None, "arguments": ""}}], "function_call": {"name": None}}
    assert document({"messages": [USER, {**ASSISTANT, **blank}]}).messages == [USER, ASSISTANT]


@pytest.mark.parametrize("name", ["tools_schema", "api_list", "tool_specifications"])
def test_tools_are_taken_under_further_names_if_they_are_schemas(name):
    bare = {"name": "f", "parameters": {"type": "object"}}
    found = document({"messages": [USER, ASSISTANT], name: [bare]})
    assert (found.tools, found.unread) == ([{"type": "function", "function": bare}], ())
    assert document({"messages": [USER, ASSISTANT], name: ["f"]}).unread == (f"column {name}",)


def test_a_system_prompt_in_a_column_fills_an_empty_system_turn():
    messages = [{"role": "system", "content": " "}, USER, ASSISTANT]
    found = document({"messages": messages, "system": "Be brief."})
    assert (found.messages[0], found.unread) == ({"role": "system", "content": "Be brief."}, ())


def test_an_unknown_role_is_refused_by_name():
    assert refusal({"messages": [USER, {"role": "critic", "content": "c"}]}).startswith("messages[1]: role 'critic' is")


@pytest.mark.parametrize("name", ["chat_template_kwargs", "template_kwargs"])
@pytest.mark.parametrize("value", [{"enable_thinking": False, "date": None}, '{"enable_thinking": false}'])
def test_a_records_settings_of_the_chat_template_are_taken(name, value):
    found = document({"messages": [USER, ASSISTANT], name: value})
    assert (found.settings, found.unread) == ({"enable_thinking": False}, ())
    assert document({"messages": [USER, ASSISTANT], name: {}}).settings is None
    listed = {"xml_tools": [{"name": "f"}], "thinking": {"type": "disabled"}}
    assert document({"messages": [USER, ASSISTANT], name: listed}).settings == listed


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({"tools": []}, "`chat_template_kwargs` sets `tools` to an empty list; expected only variables of the chat"),
        ({"add_generation_prompt": True}, "`chat_template_kwargs` sets `add_generation_prompt` to true or false; "),
        ({"bos_token": "<s>"}, "`chat_template_kwargs` sets `bos_token` to text; expected"),
        ("fast", "field `chat_template_kwargs` is text; expected an object of settings"),
    ],
)
def test_settings_that_the_renderer_makes_itself_are_refused(value, expected):
    assert refusal({"messages": [USER, ASSISTANT], "chat_template_kwargs": value}).startswith(expected)


@pytest.mark.parametrize(
    "flag", [{"train": False}, {"weight": 0}, {"loss": "no"}, {"trainable": "0"}, {"mask": True}, {"weight": 0.0}]
)
@pytest.mark.parametrize("record", [{"messages": [USER, ASSISTANT]}, {"text": "a"}], ids=["chat", "text"])
def test_a_record_whose_own_flag_says_that_it_is_not_learned_is_refused(record, flag):
    ((name, value),) = flag.items()
    assert refusal({**record, **flag}) == (
        f"field `{name}` is {value!r}, which may say that the record is not learned; remove the record "
        "(data.cleaning.bad_rows: drop leaves it out), or rename the field"
    )


@pytest.mark.parametrize("value", [[0, 1], "[0, 1]", [False, True], ["1", "0"]])
def test_a_record_with_a_list_of_flags_for_its_turns_is_refused(value):
    assert refusal({"messages": [USER, ASSISTANT], "loss_mask": value}) == (
        f"field `loss_mask` is {value!r}, which may say that turns are not learned; remove the record "
        "(data.cleaning.bad_rows: drop leaves it out), or rename the field"
    )


@pytest.mark.parametrize("flag", [{"train": True}, {"weight": 0.5}, {"mask": [0]}, {"loss": 1.73}, {"train": "a"}])
def test_other_values_of_a_records_flag_are_named_as_not_read(flag):
    assert document({"messages": [USER, ASSISTANT], **flag}).unread == (f"column {next(iter(flag))}",)


@pytest.mark.parametrize("fields", [("role", "value"), ("from", "content"), ("Role", "Content"), ("From", "Value")])
def test_roles_and_contents_may_have_either_name(fields):
    named = [dict(zip(fields, turn.values(), strict=True)) for turn in (USER, ASSISTANT)]
    assert document({"messages": named}).messages == [USER, ASSISTANT]
    assert refusal({"messages": [USER, {**ASSISTANT, "from": "human"}]}) == (
        "messages[1]: fields `role` and `from` differ; keep the one that is meant"
    )


@pytest.mark.parametrize("name", ["name", "tool_name", "toolName"])
def test_a_results_tool_is_taken_under_its_other_names(name):
    result = {"role": "tool", "content": "rain"}
    found = document({"messages": [USER, {"role": "assistant", "tool_calls": [CALL]}, {**result, name: "f"}]})
    assert (found.messages[2], found.unread) == ({**result, "name": "f"}, ())


@pytest.mark.parametrize("verdict", [{"label": False}, {"kto_tag": True}, {"label": "true"}])
def test_a_chat_with_a_verdict_on_its_answer_is_a_preference_row(verdict):
    ((name, value),) = verdict.items()
    assert refusal({"messages": [USER, ASSISTANT], **verdict}) == (
        f"a preference row (`{name}` is {value!r}), but this trainer learns from answers; keep the records with good "
        "answers and remove the field"
    )
    assert document({"messages": [USER, ASSISTANT], "label": 1}).unread == ("column label",)
