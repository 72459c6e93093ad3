"""Records to documents: Alpaca, prompt and completion, text, the recipe's field names, and records of no form."""

import json
from typing import Any

import pytest

from data_prep.documents import Document
from data_prep.forms import rename_fields
from data_prep.user_error import UserError
from tests.data_prep.records import ASSISTANT, TOOLS, USER, document, learned, refusal, turns

# Alpaca


@pytest.mark.parametrize(
    ("fields", "question"),
    [
        ({"instruction": "Add.", "input": "2 2"}, "Add.\n\n2 2"),
        ({"instruction": "Add 2 2.", "input": ""}, "Add 2 2."),
        ({"instruction": "Add 2 2.", "input": None}, "Add 2 2."),
        ({"instruction": "Add 2 2.", "source": 3}, "Add 2 2."),
        ({"instruction": "", "input": "2 2"}, "2 2"),
        ({"instruction": "Double.", "input": 0}, "Double.\n\n0"),
    ],
    ids=["with input", "empty input", "null input", "unknown field", "input only", "a number"],
)
def test_alpaca_form_becomes_a_question_and_an_answer(fields, question):
    assert turns({**fields, "output": "4"}) == [("user", question), ("assistant", "4")]
    assert document({**fields, "output": "4"}).form == "Alpaca"


@pytest.mark.parametrize("as_text", [False, True], ids=["list", "JSON text"])
def test_history_goes_before_and_is_learned_too(as_text):
    history = [["1 + 1?", "2"], ["2 + 2?", 4]]
    record = {"instruction": "4 + 4?", "output": "8", "history": json.dumps(history) if as_text else history}
    assert [content for _, content in turns(record)] == ["1 + 1?", "2", "2 + 2?", "4", "4 + 4?", "8"]
    assert learned(record) == ["2", "4", "8"]


@pytest.mark.parametrize("history", [None, [], "", "[]"])
def test_no_history_adds_nothing(history):
    assert len(turns({"instruction": "a", "output": "b", "history": history})) == 2


def test_a_system_field_is_the_first_turn():
    record = {"instruction": "a", "output": "b", "history": [["c", "d"]], "system": "Be brief."}
    assert turns(record)[:2] == [("system", "Be brief."), ("user", "c")]
    assert turns({**record, "system": None})[0] == turns({**record, "system": ""})[0] == ("user", "c")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"instruction": "a"}, "lacks field `output`; it has ['instruction'], add it, or name it under the source's"),
        ({"instruction": "a", "output": None}, "field `output` is null; expected text, correct or remove the record"),
        ({"instruction": "a", "output": ["b"]}, "field `output` is list; expected text, put it in quotes"),
        ({"instruction": "a", "output": True}, "field `output` is true or false; expected text, put it in quotes"),
        ({"instruction": "a", "output": float("nan")}, "field `output` is nan; expected text, correct or remove the"),
        ({"instruction": "a", "output": float("inf")}, "field `output` is inf; expected text, correct or remove"),
        ({"instruction": "a", "input": ["b"], "output": "4"}, "field `input` is list; expected text, put it in"),
        (
            {"instruction": "a", "output": "x\ud83d"},
            "field `output` holds half a surrogate pair at character 1; remove",
        ),
        (
            {"instruction": "a", "output": "b", "system": {}},
            "field `system` is object; expected text, put it in quotes",
        ),
        ({"instruction": "a", "output": "b", "history": "c"}, "field `history` is text; expected a list of questions"),
        ({"instruction": "a", "output": "b", "history": {"c": "d"}}, "field `history` is object; expected a list"),
        ({"instruction": "a", "output": "b", "history": [["c"]]}, "history[0] is list; expected a list of a question"),
        ({"instruction": "a", "output": "b", "history": ["c"]}, "history[0] is text; expected a list of a question"),
        ({"instruction": "a", "output": "b", "history": [["c", None]]}, "history[0]: field `answer` is null; expected"),
        (
            {"instruction": "a", "output": "b", "history": '[["\\ud83d", "c"]]'},
            "history[0]: field `question` holds half",
        ),
    ],
)
def test_a_bad_alpaca_record_is_refused(record, expected):
    assert refusal(record).startswith(expected)


@pytest.mark.parametrize(
    ("number", "text"),
    [(4, "4"), (4.0, "4.0"), (-0.5, "-0.5"), (10**400, "1" + "0" * 400)],
    ids=["whole", "float", "fraction", "huge"],
)
def test_numbers_are_answers(number, text):
    assert turns({"instruction": "a", "output": number}) == [("user", "a"), ("assistant", text)]
    assert turns({"prompt": number, "completion": number}) == [("user", text), ("assistant", text)]


# prompt and completion


@pytest.mark.parametrize("prompt", ["Sort 3, 1, 2.", "[3, 1, 2]", '["a"]', "[]", '{"a": 1}', "[{", '[{"a": 1}]'])
def test_texts_are_a_question_and_an_answer_even_if_they_look_like_json(prompt):
    record = {"prompt": prompt, "completion": "[1, 2, 3]"}
    assert turns(record) == [("user", prompt), ("assistant", "[1, 2, 3]")]
    assert (learned(record), document(record).form) == (["[1, 2, 3]"], "prompt and completion")


@pytest.mark.parametrize("as_text", [False, True], ids=["lists", "JSON text"])
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_turns_of_a_prompt_are_not_learned(as_text, system):
    prompt = [USER, {"role": "assistant", "content": "given"}, USER]
    completion = [ASSISTANT, USER, {"role": "assistant", "content": "not this", "weight": 0}, ASSISTANT]
    wrap = json.dumps if as_text else list
    record = {"prompt": wrap(prompt), "completion": wrap(completion), "system": system, "tools": TOOLS}
    first = [("system", system)] if system else []
    assert turns(record) == [*first, *((turn["role"], turn["content"]) for turn in prompt + completion)]
    assert learned(record) == ["b", "b"]
    assert document(record).tools == TOOLS


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"prompt": "a"}, "lacks field `completion`; it has ['prompt'], add it, or name it under the source's"),
        ({"prompt": "a", "completion": [ASSISTANT]}, "field `completion` is list; expected text"),
        ({"prompt": [USER], "completion": "b"}, "completion is text; expected a list of one or more turns"),
        ({"prompt": [USER]}, "completion is null; expected a list of one or more turns"),
        ({"prompt": [], "completion": "b"}, "field `prompt` is an empty list; expected text"),
        ({"prompt": [3, 1], "completion": "b"}, "field `prompt` is list; expected text"),
        ({"prompt": [USER], "completion": [{"role": "assistant"}]}, "completion[0]: lacks field `content`; it has"),
    ],
)
def test_a_bad_prompt_or_completion_is_refused(record, expected):
    assert refusal(record).startswith(expected)


# text, and records of no form


def test_a_text_has_no_turns():
    found = document({"text": " One.\n", "url": "x"})
    assert (found.text, found.messages, found.form) == (" One.\n", [], "text")


@pytest.mark.parametrize(
    ("record", "expected"),
    [
        ({"question": "a", "answer": "b"}, "fields ['answer', 'question']; expected `messages` or `conversations` (ch"),
        ({}, "fields []; expected `messages`"),
        ({f"f{i:02}": i for i in range(14)}, "fields ['f00', 'f01', 'f02', 'f03', 'f04', 'f05', 'f06', 'f07', 'f08', "),
        ({"a\nb": 1}, "fields ['a\\nb']; expected `messages`"),
        ({"text": None}, "field `text` is null; correct or remove the record"),
        ({"text": ["a"]}, "field `text` is list; expected text"),
    ],
)
def test_a_record_of_no_form_is_refused_with_its_fields(record, expected):
    assert refusal(record).startswith(expected)


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": "a", "chosen": "b", "rejected": "c"},
        {"chosen": [USER, ASSISTANT], "rejected": [USER, ASSISTANT]},
        {"prompt": "a", "messages": [USER, ASSISTANT], "chosen": [ASSISTANT], "rejected": [ASSISTANT]},
        *({"prompt": "a", "completion": "b", "label": label} for label in (False, True, 0, 1, "true", "False", "1")),
    ],
)
def test_preference_rows_are_refused(record):
    names = "chosen, rejected" if "chosen" in record else "prompt, completion, label"
    assert refusal(record).startswith(f"a preference row ({names}), but this trainer learns from answers; ")


@pytest.mark.parametrize("label", ["positive", "2", 2, 0.5, [True], None])
def test_a_label_that_is_not_a_verdict_makes_no_preference(label):
    assert turns({"prompt": "a", "completion": "b", "label": label}) == [("user", "a"), ("assistant", "b")]


@pytest.mark.parametrize("field", ["image", "images", "video", "videos", "audio", "audios"])
@pytest.mark.parametrize("record", [{"messages": [USER, ASSISTANT]}, {"text": "a"}], ids=["chat", "text"])
def test_images_and_other_media_beside_text_are_refused(record, field):
    for value in ("a.png", ["a.png"], {"path": "a.png", "bytes": b""}):
        assert refusal({**record, field: value}) == (
            f"has `{field}` beside its text; expected text only, remove the field or the record"
        )
    for none in (None, "", []):
        assert document({**record, field: none})


def test_columns_for_preferences_that_are_null_are_no_preference():
    assert turns({"messages": [USER, ASSISTANT], "chosen": None, "rejected": None})[0] == ("user", "a")


# several forms at once, and names of the recipe

ALL = {
    "messages": [USER, ASSISTANT],
    "conversations": [USER, ASSISTANT],
    "instruction": "a",
    "input": "",
    "output": "b",
    "prompt": "a",
    "completion": "b",
    "text": "a b",
}


@pytest.mark.parametrize(
    ("absent", "form"),
    [
        ([], "chat"),
        (["messages"], "ShareGPT"),
        (["messages", "conversations"], "Alpaca"),
        (["messages", "conversations", "instruction"], "prompt and completion"),
        (["messages", "conversations", "instruction", "prompt"], "text"),
    ],
)
@pytest.mark.parametrize("as_null", [True, False], ids=["null", "absent"])
def test_the_most_specific_form_wins(absent, form, as_null):
    record = {name: None if name in absent else value for name, value in ALL.items() if as_null or name not in absent}
    assert document(record).form == form


def test_a_row_of_tatsu_lab_alpaca_is_alpaca_though_it_holds_the_rendered_text_as_well():
    row = {
        "instruction": "Give three tips for staying healthy.",
        "input": "",
        "output": "1. Eat a balanced diet.",
        "text": "Below is an instruction.\n\n### Instruction:\nGive three tips for staying healthy.",
    }
    assert turns(row) == [("user", row["instruction"]), ("assistant", row["output"])]


def named(record: dict[str, Any], **fields: str) -> Document:
    return document(dict(rename_fields(record, fields, "a.jsonl:3")))


def test_the_recipes_names_for_fields_are_followed():
    dolly = {"instruction": "Add.", "context": "2 2", "response": "4", "category": "sums"}
    assert named(dolly, input="context", output="response").messages[0]["content"] == "Add.\n\n2 2"
    gsm8k = {"question": "2 + 2?", "answer": "4"}
    exchange = named(gsm8k, prompt="question", completion="answer").messages
    assert [turn["content"] for turn in exchange] == ["2 + 2?", "4"]
    assert named({"content": "One."}, text="content").text == "One."
    assert named({"dialog": [USER, ASSISTANT]}, messages="dialog").messages == [USER, ASSISTANT]


def test_a_mapped_name_is_taken_from_its_own_field_only():
    swapped = {"instruction": "the answer", "output": "the question"}
    record = named(swapped, instruction="output", output="instruction")
    assert [turn["content"] for turn in record.messages] == ["the question", "the answer"]


def test_a_mapped_field_decides_between_the_forms_of_a_record():
    assert named(ALL, text="text").text == "a b"
    assert named({**ALL, "question": "c"}, instruction="question").messages[0]["content"] == "c"
    assert named({"prompt": "a", "chosen": "b", "rejected": "c"}, completion="chosen").messages[1]["content"] == "b"


def test_optional_fields_of_the_recipe_may_be_absent_and_the_others_not():
    record = {"question": "a", "answer": "b"}
    fields = {"instruction": "question", "output": "answer"}
    optional = {"input": "context", "system": "sys", "history": "before", "tools": "functions"}
    assert len(named(record, **fields, **optional).messages) == 2
    with pytest.raises(UserError) as caught:
        named({"question": "a"}, **fields)
    assert str(caught.value) == (
        "a.jsonl:3: lacks field `answer`, which the source's `fields` names for `output`; it has ['question'], correct "
        "the recipe or the record"
    )


@pytest.mark.parametrize("choices", [["a", "4"], '["a", "4"]'], ids=["a list", "a list as JSON, as in a table"])
@pytest.mark.parametrize(
    "record",
    [
        {"instruction": "2 + 2?", "output": "4"},
        {"prompt": "2 + 2?", "completion": "4"},
        {"messages": [USER, {**ASSISTANT, "content": "4"}]},
    ],
    ids=lambda record: next(iter(record)),
)
def test_choices_that_hold_the_answer_are_kept_with_any_conversation(record, choices):
    assert document({**record, "choices": choices}).choices == ("a", "4")
    assert named({**record, "options": choices, "choices": 5}, choices="options").choices == ("a", "4")
    assert named(record, choices="options").choices == ()


@pytest.mark.parametrize("choices", [[3, 4], "[3, 4]", ["3", 4]])
def test_choices_may_be_numbers_as_answers_may(choices):
    assert document({"instruction": "2 + 2?", "output": 4, "choices": choices}).choices == ("3", "4")


@pytest.mark.parametrize(
    "choices",
    [["a", "b"], ["4"], ["4", 4], ["4", float("inf")], ["4", True], ["4", " "], {"text": ["4", "5"]}, "4", None],
    ids=["without the answer", "one", "twice", "infinity", "true", "blank", "an object", "a text", "null"],
)
def test_a_choices_field_with_another_meaning_is_ignored(choices):
    assert document({"instruction": "2 + 2?", "output": "4", "choices": choices}).choices == ()
    assert document({"messages": [USER, ASSISTANT, {**USER, "content": "4"}], "choices": ["4", "5"]}).choices == ()
