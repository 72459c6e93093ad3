"""The reported fidelity against whole logits in fp64, from the loop with fixed gates."""

import json

import pytest
import torch
from peft import PeftModel

from data_prep.encode import IGNORED
from data_prep.reader import open_prepared
from tests.export.fixed_gates import fixed_gate_model
from tests.support.tiny_adapters import METHODS, plain_model
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.export import export as exporting
from trainer.export.export import ExportRequest, export
from trainer.export.fidelity import fidelity_table, measure

ROWS = 64


@pytest.mark.parametrize("to", ["lora", "merged"])
@pytest.mark.parametrize("method", METHODS)
def test_what_is_printed_is_what_we_measure(make_run, method, to):
    run = make_run(method)
    exported = export(ExportRequest(run.folder, to, rows=ROWS))
    kept = json.loads((exported.folder / "export.json").read_text())
    before = PeftModel.from_pretrained(plain_model(run.base), run.folder / "adapter").eval()
    after = fixed_gate_model(run.base, method, run.adapter(), kept["facts"]["gates"], alpha=6.0)
    expected = measured_by_token(before, after, open_prepared(run.recipe.data, tiny_tokenizer()))
    assert [line["task"] for line in kept["price"]] == ["upper", "twice", "all"]
    printed = {line.split()[0]: line.split()[1:] for line in str(exported).splitlines()[3:]}
    for line in kept["price"]:
        tokens, *values = expected[line["task"]]
        found = [line["kl"], line["loss_before"], line["loss_after"]]
        assert line["tokens"] == tokens
        assert found == pytest.approx(values, rel=1e-4)
        assert [float(cell) for cell in printed[line["task"]][:4]] == pytest.approx([tokens, *values], rel=6e-3)
    assert expected["all"][1] > 1e-3


@torch.no_grad()
def measured_by_token(before, after, prepared):
    """{task: (tokens, KL, loss before, loss after)}, token by token."""
    seen = {}
    for row in prepared.held_out:
        ids, positions = (torch.tensor(row[key])[None].long() for key in ("input_ids", "position_ids"))
        p, q = (
            torch.log_softmax(m(input_ids=ids, position_ids=positions, use_cache=False).logits[0].double(), -1)
            for m in (before, after)
        )
        for t in range(1, len(row["labels"])):
            label = int(row["labels"][t])
            if label == IGNORED or row["position_ids"][t] == 0:
                continue
            kl = (p[t - 1].exp() * (p[t - 1] - q[t - 1])).sum().item()
            values = (kl, -p[t - 1, label].item(), -q[t - 1, label].item())
            for task in (prepared.tasks[row["task_ids"][t]], "all"):
                seen.setdefault(task, []).append(values)
    return {task: (len(v), *(sum(column) / len(v) for column in zip(*v, strict=True))) for task, v in seen.items()}


def test_scores_are_those_of_the_items_before_and_after(make_run, monkeypatch):
    """A tiny model writes no right answer: the first task is scored by the likelier of two choices, token by token."""
    run = make_run()
    prepared = open_prepared(run.recipe.data, tiny_tokenizer())
    upper = [item for item in prepared.items if item["task"] == "upper"]
    for number, item in enumerate(upper):  # of the first, which goes on where the answer ends, the answer is likelier
        item["choices"] = [item["answer"] + "s" if number == 0 else item["answer"].lower(), item["answer"]]
    monkeypatch.setattr(exporting, "open_prepared", lambda *_: prepared)
    exported = export(ExportRequest(run.folder, "lora", items_per_task=3))
    gates = json.loads((exported.folder / "export.json").read_text())["facts"]["gates"]
    before = PeftModel.from_pretrained(plain_model(run.base), run.folder / "adapter").eval()
    after = fixed_gate_model(run.base, "teamlora", run.adapter(), gates, alpha=6.0)
    asked = [upper[0], *upper[2:]]  # three of four, evenly spread
    expected = [sum(chooses_the_answer(model, item) for item in asked) / 3 for model in (before, after)]
    assert any(expected)
    by_task = {line.task: [line.score_before, line.score_after] for line in exported.fidelity}
    assert by_task == {"upper": expected, "twice": [0, 0], "all": [score / 2 for score in expected]}
    assert str(exported).splitlines()[3].split()[-2:] == [f"{score:.1%}" for score in expected]
    assert ", 6 items for the scores; " in str(exported)


@torch.no_grad()
def chooses_the_answer(model, item):
    tokenizer = tiny_tokenizer()
    prompt = tokenizer.apply_chat_template(item["messages"], tokenize=False, add_generation_prompt=True)
    start = len(tokenizer(prompt, add_special_tokens=False)["input_ids"])
    totals = {}
    for choice in item["choices"]:
        ids = torch.tensor(tokenizer(prompt + choice, add_special_tokens=False)["input_ids"])
        logits = torch.log_softmax(model(input_ids=ids[None]).logits[0], -1)
        totals[choice] = sum(logits[t - 1, ids[t]].item() for t in range(start, len(ids)))
    return max(totals, key=totals.get) == item["answer"]


def test_a_task_without_labelled_tokens_keeps_its_scores():
    nothing = torch.nn.Module()
    told = measure(nothing, nothing, [], ["a", "b"], lambda _: {"a": 0.5})
    assert [(line.task, line.tokens, line.kl, line.score_before) for line in told] == [
        ("a", 0, None, 0.5),
        ("all", 0, None, 0.5),
    ]
    assert fidelity_table(told).splitlines()[1].split() == ["a", "0", "-", "-", "-", "50.0%", "50.0%"]


def test_a_model_that_does_not_fit_is_written_but_not_measured(make_run, monkeypatch):
    monkeypatch.setattr(exporting, "free_bytes", lambda _: 1000)
    exported = export(ExportRequest(make_run().folder, "merged"))
    assert "fidelity not measured: 0.0 GB beside the run's own model do not fit" in str(exported)
    assert json.loads((exported.folder / "export.json").read_text())["price"] is None
    assert (exported.folder / "model.safetensors").exists()


def test_fewer_rows_are_measured_when_asked(make_run):
    run = make_run()
    one, all_rows = (
        export(ExportRequest(run.folder, "lora", run.folder / str(rows), rows=rows)).fidelity[-1].tokens
        for rows in (1, 64)
    )
    assert 0 < one < all_rows
