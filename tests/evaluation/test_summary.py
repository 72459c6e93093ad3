"""Scores by task and over tasks from what models gave."""

import pytest

from trainer.evaluation.evaluation_report import Evaluation
from trainer.evaluation.summary import summarize


def given(exact: float, loss: float = 1.0, tokens: int = 2, **more: float) -> dict:
    return {"given": "x", "exact_match": exact, "token_f1": 0.5, "rouge_l": 0.5, "loss": loss, "tokens": tokens, **more}


ITEMS = [
    *({"task": "sums", "messages": [{"role": "user", "content": "1 + 1"}], "answer": a} for a in ("2", "2", "3", "4")),
    *(
        {"task": "kinds", "messages": [{"role": "user", "content": "?"}], "answer": a, "choices": ["a", "b"]}
        for a in ("a", "b")
    ),
]
FOUND = {
    "adapter": [
        *(given(e, loss=1, tokens=t) for e, t in ((1, 1), (1, 2), (1, 3), (0, 4))),
        given(0, choices=1.0),
        given(0, choices=1.0),
    ],
    "base": [
        *(given(e, loss=3, tokens=t) for e, t in ((0, 1), (1, 2), (0, 3), (0, 4))),
        given(1, choices=1.0),
        given(1, choices=0.0),
    ],
}


@pytest.fixture
def summary() -> dict:
    return {task.task: task for task in summarize(ITEMS, FOUND)}


def test_each_task_is_judged_by_its_own_metric_and_the_mean_counts_tasks_alike(summary):
    assert [task.metric for task in summary.values()] == ["exact_match", "choices", ""]
    assert summary["sums"].models["adapter"]["score"] == 0.75
    assert summary["kinds"].models["base"] == pytest.approx(
        {"score": 0.5, "loss": 0.5, "exact_match": 1, "token_f1": 0.5, "rouge_l": 0.5, "choices": 0.5}
    )
    assert summary["mean"].models["adapter"]["score"] == (0.75 + 1) / 2
    assert "choices" not in summary["sums"].models["base"]


def test_the_gain_is_over_the_best_of_baselines_and_the_commonest_answer(summary):
    assert (summary["sums"].commonest, summary["sums"].distinct_answers) == (0.5, 3)
    assert summary["sums"].gain == 0.25
    assert summary["kinds"].gain == 0.5
    assert summary["mean"].gain == (0.25 + 0.5) / 2


def test_losses_are_nats_over_all_tokens_of_a_task(summary):
    assert summary["sums"].models["adapter"]["loss"] == 4 / 10
    assert summary["sums"].differences["base"]["loss"].mean == pytest.approx(4 / 10 - 12 / 10)
    assert summary["mean"].differences["base"]["score"].mean == pytest.approx((0.5 + 0.5) / 2)


def test_a_question_without_words_of_its_own_is_shown_by_the_last_words_before_it(summary):
    called = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {}}}]}
    *tasks, mean = summary.values()
    for messages, shown in (([{"role": "user", "content": "1 + 1"}, called], "1 + 1"), ([called], "")):
        items = [{**ITEMS[0], "messages": messages, "models": {n: FOUND[n][0] for n in ("base", "adapter")}}]
        assert f"[sums] {shown}" in str(Evaluation({"base": None}, {}, tasks, mean, items)).splitlines()


def test_the_table_has_a_line_a_task_and_the_mean_with_intervals(summary):
    *tasks, mean = summary.values()
    items = [{**item, "models": {n: FOUND[n][i] for n in ("base", "adapter")}} for i, item in enumerate(ITEMS)]
    lines = str(Evaluation({"base": None}, {}, tasks, mean, items)).splitlines()
    assert lines[1].split()[:8] == ["task", "items", "answers", "metric", "majority", "base", "adapter", "gain"]
    assert lines[2].split()[:8] == ["sums", "4", "3", "exact_match", "50%", "25%", "75%", "+25"]
    assert lines[2].endswith("]")
    assert [line.split()[0] for line in lines[2:5]] == ["sums", "kinds", "mean"]
    assert lines[7].split()[:4] == ["task", "base", "adapter", "adapter"]
    assert lines[8].split()[:4] == ["sums", "1.200", "0.400", "-0.800"]
