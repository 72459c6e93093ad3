"""Generated documents: repeatable by seed, and one-line errors for bad generators and options."""

import sys

import pytest

from data_prep.config import ReasoningGymSource
from data_prep.sources import gym
from data_prep.sources.gym import GymProcess
from data_prep.user_error import UserError

ARITHMETIC = {"min_terms": 2, "max_terms": 2, "max_digits": 1, "operators": ["+"], "allow_parentheses": False}


GENERATORS = GymProcess()  # takes a second to start


def read(generator="basic_arithmetic", **keys):
    source = {"type": "reasoning_gym", "task": "sums", "generator": generator, "count": 5, **keys}
    origins = {index: f"{generator}[{index}]" for index in range(source["count"])}
    return GENERATORS.documents(ReasoningGymSource(**source), "data.sources.2", origins)


def contents(documents):
    return [[turn["content"] for turn in document.messages] for document in documents]


def test_documents_are_a_question_and_its_answer():
    documents = read(options=ARITHMETIC, prompt="Reply with a number.\n{question}")
    assert [document.origin for document in documents] == [f"basic_arithmetic[{i}]" for i in range(5)]
    for document in documents:
        user, assistant = document.messages
        assert (document.task, user["role"], assistant["role"]) == ("sums", "user", "assistant")
        instruction, _, question = user["content"].partition("\n")
        numbers = [int(word.strip("?.=")) for word in question.split() if word.strip("?.=").isdecimal()]
        assert instruction == "Reply with a number."
        assert int(assistant["content"]) == sum(numbers)


def test_same_seed_gives_the_same_documents_and_another_seed_others():
    assert contents(read(seed=7)) == contents(read(seed=7))
    assert contents(read(seed=7)) != contents(read(seed=8))


@pytest.mark.parametrize(
    "generator", ["isomorphic_strings", "list_functions", "polynomial_multiplication", "ransom_note", "word_ladder"]
)
def test_generators_that_use_sets_or_global_random_state_repeat_in_any_process_and_order(generator):
    source = ReasoningGymSource(type="reasoning_gym", task="sums", generator=generator, count=20)
    backwards = GymProcess().documents(source, "data.sources.2", dict.fromkeys(reversed(range(20)), ""))
    assert contents(read(generator, count=20)) == contents(backwards[::-1])


def test_a_killed_process_gives_a_one_line_error(monkeypatch):
    monkeypatch.setattr(gym, "_PROCESS", [sys.executable, "-c", ""])
    source = ReasoningGymSource(type="reasoning_gym", task="sums", generator="basic_arithmetic", count=5)
    with pytest.raises(UserError, match=r"^data\.sources\.2: the process of basic_arithmetic ended, most") as caught:
        GymProcess().documents(source, "data.sources.2", {0: ""})
    assert "\n" not in str(caught.value)


def test_a_larger_count_only_adds_documents():
    assert contents(read(count=8))[:5] == contents(read(count=5))


@pytest.mark.parametrize(
    ("generator", "options", "message"),
    [
        (
            "basic_arithmetics",
            {},
            r"\.generator: 'basic_arithmetics' is not a reasoning-gym generator; nearest: basic_ari",
        ),
        ("qqqq", {}, r"\.generator: 'qqqq' is not a reasoning-gym generator; it has .*basic_arithmetic"),
        ("basic_arithmetic", {"terms": 3}, r"\.options: basic_arithmetic has no option 'terms'; it has .*min_terms"),
        ("basic_arithmetic", {"min_terms": 9, "max_terms": 2}, r"\.options: .* refuses its options .*correct the opt"),
        ("basic_arithmetic", {"min_terms": "many"}, r"\.options: .* refuses its options .*correct the options"),
    ],
    ids=["near a known generator", "unknown generator", "unknown option", "contradicting options", "wrong type"],
)
def test_what_reasoning_gym_cannot_make_is_refused_in_one_line(generator, options, message):
    with pytest.raises(UserError, match=rf"^data\.sources\.2{message}") as caught:
        read(generator, options=options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"options": {"size": 3}}, "'size' is set by the source's own key `count`"),
        ({"options": {"seed": 3}}, "'seed' is set by the source's own key `seed`"),
        ({"prompt": "Reply."}, r"'Reply.' does not contain \{question\}"),
    ],
)
def test_keys_that_contradict_the_source_are_refused(keys, message):
    with pytest.raises(ValueError, match=message):
        read(**keys)
