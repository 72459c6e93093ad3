"""evaluation.json is there whole, the old one or the new one."""

import json

import pytest

from trainer.evaluation.evaluation_report import EVALUATION, Evaluation, write_json, write_tensorboard
from trainer.evaluation.summary import TaskSummary

NOTHING = TaskSummary("t", "exact_match", 0, 0, 0.0, {}, {}, 0.0)


def evaluation(answer: str) -> Evaluation:
    return Evaluation({}, {}, [], NOTHING, [{"answer": answer}])


def test_it_is_read_as_it_was_written_in_any_script(tmp_path):
    write_json(evaluation("답 é"), tmp_path)
    assert json.loads((tmp_path / EVALUATION).read_text(encoding="utf-8"))["items"] == [{"answer": "답 é"}]
    assert [path.name for path in tmp_path.iterdir()] == [EVALUATION]


@pytest.mark.parametrize(("metrics", "written"), [('{"step": 3}\n{"st', True), ("", False), (None, False)])
def test_damaged_metrics_cost_the_scalars_at_most(tmp_path, metrics, written):
    if metrics is not None:
        (tmp_path / "metrics.jsonl").write_text(metrics)
    write_tensorboard(evaluation("any"), tmp_path)
    assert (tmp_path / "tensorboard").is_dir() is written


def test_a_full_disk_costs_no_older_evaluation(tmp_path):
    write_json(evaluation("old"), tmp_path)
    (tmp_path / f".{EVALUATION}.part").symlink_to("/dev/full")
    with pytest.raises(OSError, match="No space left"):
        write_json(evaluation("new"), tmp_path)
    assert json.loads((tmp_path / EVALUATION).read_text())["items"] == [{"answer": "old"}]
    assert [path.name for path in tmp_path.iterdir()] == [EVALUATION]
