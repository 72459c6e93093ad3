"""Scores worked out by hand."""

import pytest

from trainer.evaluation.scoring import (
    exact_match,
    likeliest,
    likeliest_by_length,
    metrics_of,
    rouge_l,
    token_f1,
)


def test_an_exact_match_may_differ_in_outer_white_space_and_one_full_stop():
    assert exact_match(" 6 September.\n", "6 September") == 1
    assert exact_match("6 september", "6 September") == 0
    assert exact_match("6 September..", "6 September") == 0


@pytest.mark.parametrize("score", [exact_match, token_f1, rouge_l])
@pytest.mark.parametrize("thought", ["<think>\na b c\n</think>\n\n", "a </think> b </think>"])
def test_reasoning_before_an_answer_does_not_count(score, thought):
    assert score(f"{thought}cat", "cat") == score("cat", f"{thought}cat") == 1
    assert score(f"{thought}cat", f"{thought}dog") == 0
    assert score("<think>\ncat", "cat") < 1  # reasoning that has not ended is no answer


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ("The cat sat.", "a cat, sat", 1),  # case, punctuation and articles do not count
        ("cat", "cat dog", 2 / 3),  # precision 1, recall 1/2
        ("cat cat cat", "cat dog", 2 / 5),  # a word counts as often as both have it: 1/3 and 1/2
        ("bird", "cat dog", 0),
        ("", "cat", 0),
        ("the", "a", 1),  # nothing is left of either
        ("schöne Straße", "Straße", 2 / 3),
    ],
)
def test_token_f1_is_that_of_squad(given, wanted, expected):
    assert token_f1(given, wanted) == pytest.approx(expected)


@pytest.mark.parametrize(
    ("given", "wanted", "expected"),
    [
        ("police kill the gunman", "police killed the gunman", 3 / 4),  # Lin 2004: police the gunman
        ("the gunman kill police", "police killed the gunman", 2 / 4),  # the gunman
        ("a b c d", "a c", 2 * (1 / 2 * 1) / (1 / 2 + 1)),
        ("ветер дует", "Ветер дует!", 1),  # any script
        ("की", "का", 0),  # differ in a combining mark
        ("风很大", "风大", 4 / 5),  # 风 大
        ("コーラ", "コラ", 4 / 5),
        ("กินข้าว", "กินน้ำ", 4 / 9),  # กิ น, of กิ น ข้ า ว and กิ น น้ ำ
        ("", "a", 0),
    ],
)
def test_rouge_l_is_the_f_measure_of_the_longest_common_subsequence(given, wanted, expected):
    assert rouge_l(given, wanted) == pytest.approx(expected)


def test_the_likeliest_choice_goes_by_the_sum_and_by_length_by_the_mean_of_characters():
    assert likeliest([-4.0, -3.0, -5.0]) == 1
    assert likeliest_by_length([-4.0, -3.0, -5.0], ["aaaa", "aa", "aaaaaaaaaa"]) == 2


def test_a_task_is_judged_by_its_metric_or_by_its_choices_or_by_exact_match():
    with_choices, without = {"task": "t", "choices": ["a", "b"]}, {"task": "t"}
    assert metrics_of([{**with_choices, "metric": "rouge_l"}]) == {"t": "rouge_l"}
    assert metrics_of([with_choices, with_choices]) == {"t": "choices"}
    assert (
        metrics_of([with_choices, without, with_choices]) == metrics_of([without, with_choices]) == {"t": "exact_match"}
    )
    assert metrics_of([without, {**with_choices, "task": "u"}]) == {"t": "exact_match", "u": "choices"}
