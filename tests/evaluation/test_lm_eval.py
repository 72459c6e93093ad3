"""lm-eval's own harness on a loaded run: it finds the same choices the likeliest."""

import json

import pytest

from data_prep.chat import ChatTemplate
from trainer.evaluation.generation import prompt_text
from trainer.evaluation.likelihood import encode_choices, log_likelihoods
from trainer.evaluation.scoring import likeliest

pytestmark = pytest.mark.slow


def test_lm_eval_runs_on_a_loaded_run_and_agrees_on_choices(run, items, tmp_path, monkeypatch):
    lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: bash launch/install.sh test")
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    template = ChatTemplate(run.tokenizer)
    rows = [
        {"prompt": prompt_text(template, item), "choices": item["choices"], "gold": item["choices"].index(
            item["answer"])}
        for item in items
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    task = {
        "task": "local",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "rows.jsonl")}, "cache_dir": str(tmp_path / "cache")},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "{{prompt}}",
        "doc_to_choice": "choices",
        "doc_to_target": "gold",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    }
    model = HFLM(pretrained=run.model, tokenizer=run.tokenizer, batch_size=4)
    told = lm_eval.simple_evaluate(
        model=model, tasks=[task], task_manager=TaskManager(include_defaults=False), bootstrap_iters=0
    )
    texts = [encode_choices(item, run.tokenizer, template) for item in items]
    totals = [log_likelihoods(run.model, own, run.tokenizer.pad_token_id) for own in texts]
    right = [likeliest(found) == row["gold"] for found, row in zip(totals, rows, strict=True)]
    assert 0 < sum(right) < len(items)
    assert told["results"]["local"]["acc,none"] == pytest.approx(sum(right) / len(items))
    for sample, ours in zip(sorted(told["samples"]["local"], key=lambda s: s["doc_id"]), totals, strict=True):
        theirs = [response[0][0] for response in sample["resps"]]
        # lm-eval counts the prompt's last line end to every choice, so differences between choices are compared
        assert [t - theirs[0] for t in theirs] == pytest.approx([o - ours[0] for o in ours], abs=1e-3)
