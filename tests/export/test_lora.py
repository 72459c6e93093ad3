"""The exported LoRA: gates are means over tokens, and plain PEFT computes what our model does with them fixed."""

import json
import subprocess
import sys

import pytest
import torch
from peft import PeftConfig, PeftModel
from safetensors.torch import load_file

from data_prep.reader import open_prepared
from tests.export.fixed_gates import fixed_gate_model, omega_of
from tests.support.tiny_adapters import METHODS, config_of, logits, plain_model
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.export.export import ExportRequest, export
from trainer.export.mean_gates import calibration_rows

PLAIN_PEFT = """
import sys
import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, out, *adapters = sys.argv[1:]
for adapter in adapters:
    model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32), adapter)
    with torch.no_grad():
        logits = model(input_ids=torch.arange(3, 27).view(2, 12)).logits
    save_file({"logits": logits}, f"{out}/{adapters.index(adapter)}.safetensors")
assert not any(name.partition(".")[0] in ("trainer", "data_prep") for name in sys.modules)
"""
ALL_ROWS = 1000


def exported_gates(folder):
    return json.loads((folder / "export.json").read_text())["facts"]["gates"]


def test_plain_peft_computes_our_model_with_fixed_gates(make_run, tmp_path):
    runs = {method: make_run(method) for method in METHODS}
    folders = [export(ExportRequest(run.folder, "lora")).folder for run in runs.values()]
    base = runs["teamlora"].base
    command = [sys.executable, "-c", PLAIN_PEFT, str(base), str(tmp_path), *map(str, folders)]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    with torch.no_grad():
        untouched = logits(plain_model(base))
        for index, (method, run) in enumerate(runs.items()):
            found = load_file(tmp_path / f"{index}.safetensors")["logits"]
            expected = logits(fixed_gate_model(base, method, run.adapter(), exported_gates(folders[index]), alpha=6.0))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
            assert (found - untouched).abs().max() > 0.1


@pytest.mark.parametrize(
    ("method", "options"), [*((m, {}) for m in METHODS), ("teamlora", {"renormalize": True})], ids=[*METHODS, "renorm"]
)
@pytest.mark.parametrize("task", [None, "twice"])
def test_gates_are_means_over_real_tokens(make_run, method, options, task):
    run = make_run(method, **options)
    found = exported_gates(export(ExportRequest(run.folder, "lora", task=task, rows=ALL_ROWS)).folder)
    model = PeftModel.from_pretrained(plain_model(run.base), run.folder / "adapter").eval()
    adapter, sums, tokens = run.adapter(), dict.fromkeys(found, 0.0), 0
    prepared = open_prepared(run.recipe.data, tiny_tokenizer())
    for row in prepared.train:
        counted = torch.tensor([task is None or prepared.tasks[t] == task for t in row["task_ids"]])
        tokens += int(counted.sum())
        for name, x in inputs_of(model, row, found).items():
            omegas = [omega_of(config_of(method, **options), adapter[name], token) for token in x[0][counted]]
            sums[name] = sums[name] + sum(omegas)
    assert tokens > 100
    for name, mean in found.items():
        torch.testing.assert_close(torch.tensor(mean).double(), sums[name] / tokens, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def inputs_of(model, row, names):
    """What each of the adapted linears was given in one forward, [1, seq, d_in]."""
    seen = {}
    base = model.get_base_model()
    hooks = [
        base.get_submodule(name).register_forward_pre_hook(lambda _, args, name=name: seen.update({name: args[0]}))
        for name in names
    ]
    ids, positions = (torch.tensor(row[key])[None].long() for key in ("input_ids", "position_ids"))
    model(input_ids=ids, position_ids=positions, use_cache=False)
    for hook in hooks:
        hook.remove()
    return seen


def test_calibration_draws_rows_by_seed_and_only_such_as_hold_the_task(make_run):
    prepared = open_prepared(make_run().recipe.data, tiny_tokenizer())
    drawn = [
        [tuple(b["input_ids"][0].tolist()) for b in calibration_rows(prepared, 2, seed, None)] for seed in (0, 0, 3)
    ]
    assert [len(rows) for rows in drawn] == [2, 2, 2]
    assert drawn[0] == drawn[1] != drawn[2]
    for batch in calibration_rows(prepared, 3, 0, 1):
        assert (batch["task_ids"] == 1).any()


@pytest.mark.parametrize(("method", "rank"), [("teamlora", 12), ("moelora", 12), ("hydralora", 3)])
def test_the_rank_is_that_of_all_experts_and_hydraloras_that_of_its_one_a(make_run, method, rank):
    run = make_run(method)
    config = PeftConfig.from_pretrained(export(ExportRequest(run.folder, "lora")).folder)
    assert (config.peft_type.value, config.r, config.lora_alpha) == ("LORA", rank, rank)
    assert config.base_model_name_or_path == str(run.base)


def test_experts_added_later_are_folded_too(make_run):
    run = make_run(num_router_outputs=3)
    folder = export(ExportRequest(run.folder, "lora")).folder
    model = PeftModel.from_pretrained(plain_model(run.base), folder)
    expected = fixed_gate_model(run.base, "teamlora", run.adapter(), exported_gates(folder), alpha=6.0)
    torch.testing.assert_close(logits(model), logits(expected), rtol=1e-4, atol=1e-4)


def test_a_run_of_method_lora_is_exported_as_it_computes(make_run):
    run = make_run("lora")
    exported = export(ExportRequest(run.folder, "lora"))
    found, expected = (
        logits(PeftModel.from_pretrained(plain_model(run.base), folder).eval())
        for folder in (exported.folder, run.folder / "adapter")
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    assert exported.fidelity[-1].kl == pytest.approx(0, abs=1e-8)


def test_peft_is_the_adapters_folder_as_it_is(make_run):
    run = make_run()
    exported = export(ExportRequest(run.folder, "peft"))
    assert "import trainer.adapters" in str(exported)
    for path in (run.folder / "adapter").iterdir():
        assert (exported.folder / path.name).read_bytes() == path.read_bytes()
