from pathlib import Path

import pytest
import yaml
from peft import get_peft_model

from tests.support.tiny_adapters import config_of, wake
from tests.support.tiny_models import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.base.loader import load_base
from trainer.evaluation.loaded_models import LoadedRun, load_run
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe


@pytest.fixture(scope="session")
def run_folder(tmp_path_factory) -> Path:
    """What a finished run leaves, as far as evaluation reads it: a tiny NF4 base and an adapter that does something."""
    folder = tmp_path_factory.mktemp("evaluated")
    tiny_llama(folder / "base", tie=True)
    tiny_tokenizer().save_pretrained(folder / "base")
    recipe = Recipe.model_validate(
        {
            "run": {"name": "run", "output_dir": str(folder)},
            "base": {"model": str(folder / "base"), "dtype": "fp32"},
            "data": {
                "prepared_dir": "unused",
                "seq_len": 16,
                "system_prompt": "Give only the answer.",
                "sources": [{"type": "files", "task": "unused", "path": "unused"}],
            },
            "train": {"steps": 1, "global_batch_size": 1},
            "deepspeed": {"config": "unused"},
        }
    )
    model = get_peft_model(load_base(recipe.base, "cpu"), config_of("teamlora", target_modules=["q_proj", "down_proj"]))
    wake(model)
    model.save_pretrained(folder / "run" / "adapter")
    (folder / "run" / "recipe.yaml").write_text(dump_recipe(recipe))
    assert yaml.safe_load((folder / "run" / "recipe.yaml").read_text())["base"]["quantization"] == "nf4"
    return folder / "run"


@pytest.fixture(scope="session")
def run(run_folder) -> LoadedRun:
    return load_run(run_folder)


@pytest.fixture(scope="session")
def items() -> list[dict]:
    """Held-out items of unequal length, each with choices."""
    made = []
    for i in range(19):
        turns = [
            {"role": "system", "content": "Give only the answer."},
            {"role": "user", "content": f"Sort {'these words ' * (i % 5)}and the number {i}."},
        ]
        choices = [f"word {i}", f"the number {i} of {i}", "letters"]
        made.append({"task": "sort", "messages": turns, "answer": choices[i % 3], "choices": choices})
    return made
