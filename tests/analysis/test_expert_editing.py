"""Experts listed, dropped and added: what remains computes what it computed, and a run can start from the result."""

import json

import pytest
import torch
from peft import PeftConfig, PeftModel

from data_prep.user_error import UserError
from tests.support import scene
from tests.support.full_disk import files_up_to
from tests.support.tiny_adapters import adapted, logits, plain_model
from tests.support.tiny_models import tiny_llama
from trainer.adapters.attach import attach_adapter, check_adapter
from trainer.adapters.layer import Experts
from trainer.analysis.expert_editing import change_experts, list_experts
from trainer.recipe import AdapterConfig
from trainer.recipe_file import dump_recipe


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_llama(tmp_path_factory.mktemp("base") / "llama")


@pytest.fixture
def run(request, tmp_path, llama):
    """A finished run whose adapter does something."""
    method, options = getattr(request, "param", ("teamlora", {}))
    folder = tmp_path / "run"
    adapted(llama, method, **options).save_pretrained(folder / "adapter")
    (folder / "recipe.yaml").write_text(dump_recipe(scene.recipe(llama)))
    records = [{"step": 1, "router_weight": [0.4, 0.3, 0.2, 0.1]}, {"step": 2}]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder


@torch.no_grad()
def output(llama, folder):
    return logits(PeftModel.from_pretrained(plain_model(llama), folder))


def test_list_shows_each_experts_last_measured_mean_weight(run):
    assert [line.split() for line in list_experts(run).splitlines()[1:]] == [
        ["0", "0.4000"], ["1", "0.3000"], ["2", "0.2000"], ["3", "0.1000"],
    ]  # fmt: skip


@pytest.mark.parametrize("add", [1, 3])
def test_adding_experts_changes_no_output(run, llama, add):
    change_experts(run, None, add, None)
    changed = run / f"adapter-{4 + add}experts"
    torch.testing.assert_close(output(llama, changed), output(llama, run / "adapter"), rtol=1e-5, atol=1e-5)
    assert PeftConfig.from_pretrained(changed).num_experts == 4 + add


@pytest.mark.parametrize("content", [None, "", "{\n", '3\n[]\n{"step": 1, "router_weight": [null, "a", 0.2, 0.1]}\n'])
def test_metrics_that_cannot_be_read_are_as_none(run, content):
    (run / "metrics.jsonl").unlink()
    if content is not None:
        (run / "metrics.jsonl").write_text(content)
    assert [line.split()[1:] for line in list_experts(run).splitlines()[1:]] == [["not", "measured"]] * 4


@pytest.mark.parametrize("changes", [{"num_experts": 10**9}, {"alpha": float("nan")}, {"expert_rank": 2}])
def test_a_damaged_adapter_is_refused(run, changes):
    path = run / "adapter" / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))
    for ask in (list_experts, lambda folder: change_experts(folder, [0], 0, None)):
        with pytest.raises(UserError) as caught:
            ask(run)
        assert str(caught.value).startswith(str(run / "adapter"))
    assert sorted(each.name for each in run.iterdir()) == ["adapter", "metrics.jsonl", "recipe.yaml"]


def test_a_new_expert_learns(run, llama):
    change_experts(run, None, 1, None)
    model = PeftModel.from_pretrained(plain_model(llama), run / "adapter-5experts", is_trainable=True)
    logits(model).square().mean().backward()
    for module in model.modules():
        if isinstance(module, Experts):
            assert module.experts.grad[4].norm() > 0.01 * module.experts.grad[:4].norm(dim=(1, 2)).min()


def test_dropping_experts_leaves_the_rest_as_if_the_dropped_gave_nothing(run, llama, tmp_path):
    change_experts(run, [0, 2], 0, tmp_path / "two")
    model = PeftModel.from_pretrained(plain_model(llama), run / "adapter")
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, Experts):
                module.experts[[1, 3]] = 0
        expected = logits(model)
    torch.testing.assert_close(output(llama, tmp_path / "two"), expected, rtol=1e-5, atol=1e-5)


def test_a_run_starts_from_what_was_written_and_it_can_be_changed_again(run, llama):
    said = change_experts(run, None, 2, None).splitlines()[1]
    given = dict(word.removeprefix("adapter.").split("=") for word in said.split() if "=" in word)
    types = {"num_experts": int, "expert_rank": int, "alpha": float}
    section = AdapterConfig(**{name: types.get(name, str)(value) for name, value in given.items()})
    model = plain_model(llama)
    check_adapter(model, section)
    attach_adapter(model, section)
    (run / "adapter").rename(run / "first")
    (run / "adapter-6experts").rename(run / "adapter")
    change_experts(run, [0, 1, 2, 3], 0, None)
    torch.testing.assert_close(output(llama, run / "adapter-4experts"), output(llama, run / "first"))


@pytest.mark.parametrize(
    ("run", "keep", "said"),
    [
        (("teamlora", {}), [0, 4], "--keep: there is no expert 4; .* has 0 to 3"),
        (("moelora", {}), [0], "only teamlora has the interaction matrix"),
        (("teamlora", {"renormalize": True}), [0], "renormalize=true makes every expert's weight depend"),
    ],
    indirect=["run"],
)
def test_what_cannot_be_changed_is_refused(run, keep, said):
    before = sorted(run.rglob("*"))
    with pytest.raises(UserError, match=said):
        change_experts(run, keep, 0, None)
    assert sorted(run.rglob("*")) == before


def test_an_existing_folder_is_left_alone(run):
    with pytest.raises(UserError, match=r"--to: .* exists"):
        change_experts(run, [0], 0, run / "adapter")


def test_a_disk_that_refuses_is_told_in_one_line_and_leaves_nothing(run):
    with (
        files_up_to(2_000),
        pytest.raises(UserError, match=r"^--to: cannot write .*adapter-5experts .*; give a folder"),
    ):
        change_experts(run, None, 1, None)
    assert not [path for path in run.iterdir() if "5experts" in path.name]
