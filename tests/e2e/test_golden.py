"""What commit 0a15e39 left on users' disks (tests/golden) loads, evaluates, resumes and exports to the same bits.

Losses are compared bit for bit on the kind of processor that made them, to 1e-5 on another, whose kernels add in
another order.
"""

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from datasets import load_from_disk
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.golden.make import METHODS, SAVED_AT, processor
from trainer.cli import main
from trainer.recipe_file import load_recipe

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).parent.parent / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
REL = 0 if processor() == EXPECTED["processor"] else 1e-5
MEASURED = {"step_seconds", "tokens_per_second", "labelled_tokens_per_second", "peak_memory_bytes"}


@pytest.fixture
def golden(tmp_path, monkeypatch) -> Iterator[Path]:
    """A copy of the folder, as the current one."""
    shutil.copytree(GOLDEN, tmp_path / "golden")
    monkeypatch.chdir(tmp_path / "golden")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield tmp_path / "golden"
    torch.set_num_threads(threads)


def test_a_run_resumes_from_its_checkpoint_and_ends_as_it_ended_then(golden):
    run = golden / "runs" / "teamlora"
    before, records = load_file(run / "adapter" / "adapter_model.safetensors"), read_records(run)
    shutil.rmtree(run / "adapter")
    assert main(["train", "recipe.yaml"]) == 0
    again = read_records(run)
    assert again[:SAVED_AT] == records[:SAVED_AT]
    assert len(again) == len(records)
    for now, then in zip(again, records, strict=True):
        assert_same(
            {k: v for k, v in now.items() if k not in MEASURED}, {k: then[k] for k in then if k not in MEASURED}
        )
    after = load_file(run / "adapter" / "adapter_model.safetensors")
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) if REL == 0 else torch.allclose(after[name], tensor, atol=1e-4), name


@pytest.mark.parametrize("method", METHODS)
def test_an_adapter_of_each_method_gives_the_scores_that_it_gave(golden, method, capsys):
    assert main(["evaluate", f"runs/{method}", "--against", "none", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert_same({task["task"]: task["models"]["adapter"] for task in found["tasks"]}, EXPECTED[method]["tasks"])
    assert [item["models"]["adapter"]["given"] for item in found["items"]] == EXPECTED[method]["answers"]


def test_the_merged_export_is_loaded_and_written_to_the_same_bits(golden):
    assert main(["export", "runs/teamlora", "--to", "merged", "--output", "again", "--rows", "8"]) == 0
    before, after = (load_file(golden / folder / "model.safetensors") for folder in ("export-merged", "again"))
    assert after.keys() == before.keys()
    for name, tensor in before.items():
        assert torch.equal(after[name], tensor) if REL == 0 else torch.allclose(after[name], tensor, atol=1e-4), name
    model = AutoModelForCausalLM.from_pretrained(golden / "export-merged")
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before.get(name, before["model.embed_tokens.weight"])), name


def test_the_prepared_set_serves_training_whatever_code_made_it(golden):
    """Also where the recipe has keys by now that the manifest does not know."""
    from data_prep.reader import open_prepared
    from trainer.base.model_config import load_tokenizer

    recipe = load_recipe(golden / "recipe.yaml")
    manifest = json.loads((golden / "prepared" / "manifest.json").read_text())
    del manifest["config"]["mask_history"], manifest["config"]["mixing"]["temperature"]
    (golden / "prepared" / "manifest.json").write_text(json.dumps(manifest))
    prepared = open_prepared(recipe.data, load_tokenizer(recipe.base))
    stored = load_from_disk(GOLDEN / "prepared" / "train")
    assert [list(row["input_ids"]) for row in prepared.train] == [row["input_ids"] for row in stored]
    assert prepared.tasks == ["upper", "twice"]


def read_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def assert_same(found: Any, expected: Any) -> None:
    """Nested values, numbers within REL."""
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        for key in expected:
            assert_same(found[key], expected[key])
    elif isinstance(expected, list):
        assert len(found) == len(expected)
        for one, other in zip(found, expected, strict=True):
            assert_same(one, other)
    elif isinstance(expected, float):
        assert found == pytest.approx(expected, rel=REL, abs=1e-6 if REL else 0)
    else:
        assert found == expected
