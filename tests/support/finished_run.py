"""Finished runs whose adapters do something, made without training: a base in fp32 and two tasks' prepared set."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from data_prep.prepare import prepare
from tests.support.tiny_adapters import config_of, plain_model, wake
from tests.support.tiny_models import tiny_llama
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.base.base_fingerprint import fingerprint, write_base_file
from trainer.base.model_config import load_tokenizer
from trainer.recipe import Recipe
from trainer.recipe_file import dump_recipe

TASKS = {"upper": str.upper, "twice": lambda word: f"{word} {word}"}


@dataclass(frozen=True)
class Run:
    """A finished run."""

    folder: Path
    recipe: Recipe

    @property
    def base(self) -> Path:
        return Path(self.recipe.base.model)

    def adapter(self) -> dict[str, dict[str, Tensor]]:
        """The saved tensors, {linear of the base: {parameter: value}}."""
        found: dict[str, dict[str, Tensor]] = {}
        for name, tensor in load_file(self.folder / "adapter" / "adapter_model.safetensors").items():
            owner, _, parameter = name.removeprefix("base_model.model.").rpartition(".")
            found.setdefault(owner.rpartition(".")[0], {})[parameter] = tensor
        return found


def prepare_tasks(folder: Path, **base_sizes: Any) -> Path:
    """Makes the base and the prepared set in `folder`, and returns it. With a file template.jinja there, by that."""
    tiny_llama(folder / "base", tie=True, dtype=torch.float32, **base_sizes)
    tiny_tokenizer().save_pretrained(folder / "base")
    for task, change in TASKS.items():
        lines = [{"instruction": f"{task} {word}", "output": change(word)} for word in (f"word{i}" for i in range(24))]
        (folder / f"{task}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    recipe = make_recipe(folder)
    prepare(recipe.data, load_tokenizer(recipe.base, recipe.data.chat_template), say=lambda _: None)
    return folder


def finish_run(
    prepared: Path,
    folder: Path,
    method: str = "teamlora",
    quantization: str = "none",
    dtype: str = "fp32",
    **options: Any,
) -> Run:
    """A run of a method in `folder`; `options` are of the adapter's configuration."""
    recipe = make_recipe(prepared, quantization, dtype, method)
    lora = LoraConfig(r=4, lora_alpha=6, target_modules=["up_proj"], init_lora_weights=False, task_type="CAUSAL_LM")
    torch.manual_seed(0)
    model = get_peft_model(plain_model(prepared / "base"), lora if method == "lora" else config_of(method, **options))
    wake(model)
    model.save_pretrained(folder / "adapter")
    write_base_file(folder / "adapter", recipe.base.model, fingerprint(prepared / "base"))
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    return Run(folder, recipe)


def make_recipe(folder: Path, quantization: str = "none", dtype: str = "fp32", method: str = "teamlora") -> Recipe:
    data: dict[str, Any] = {"prepared_dir": str(folder / "prepared"), "seq_len": 128, "held_out": 4}
    data["sources"] = [{"type": "files", "task": task, "path": str(folder / f"{task}.jsonl")} for task in TASKS]
    if (folder / "template.jinja").is_file():
        data["chat_template"] = str(folder / "template.jinja")
    return Recipe.model_validate(
        {
            "run": {"name": "first"},
            "base": {"model": str(folder / "base"), "quantization": quantization, "dtype": dtype},
            "adapter": {"method": method},
            "data": data,
            "train": {"steps": 1, "global_batch_size": 1},
            "deepspeed": {"config": "ds_configs/single.json"},
        }
    )
