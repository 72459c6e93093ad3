"""The models that are asked: one base, bare or under the adapter of a finished run, whole on a device or sharded."""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import CONFIG_NAME
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import trainer.adapters  # noqa: F401 (registers our methods with PEFT)
from data_prep.user_error import UserError
from trainer.adapters.adapter_folder import load_adapter
from trainer.adapters.layer import freeze_experts
from trainer.base.base_fingerprint import check_base_file
from trainer.base.loader import load_opened
from trainer.base.model_config import load_tokenizer
from trainer.base.sharding import Unsharded
from trainer.base.weight_map import OpenedBase, open_base
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run import run_dir


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in one process: its base whole on one device, under its adapter."""

    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_run(directory: Path) -> LoadedRun:
    """Raises UserError where there is no finished run, or its base cannot be used."""
    recipe = run_dir.open_run(directory)
    adapter = directory / run_dir.ADAPTER
    opened = open_base(recipe.base)
    check_base_file(adapter, recipe.base.model, opened.fingerprint)
    base = load_whole(opened, "cuda" if torch.cuda.is_available() else "cpu")
    return LoadedRun(recipe, put_on(base, adapter), load_tokenizer(recipe.base, recipe.data.chat_template))


def open_subject(directory: Path, recipe: Path | None) -> tuple[Recipe, Path]:
    """What is evaluated: the recipe that tells base and data, and the adapter's folder.

    directory: a finished run, which has its own recipe, or an adapter's folder, for which `recipe` is needed.
    Raises UserError where there is neither, or no recipe.
    """
    if recipe is not None:
        return load_recipe(recipe), find_adapter(directory)
    if (directory / CONFIG_NAME).is_file() and not (directory / run_dir.RECIPE).is_file():
        raise UserError(f"{directory}: an adapter's folder names no held-out data; give --recipe RECIPE as well")
    return run_dir.open_run(directory), directory / run_dir.ADAPTER


def find_adapter(directory: Path) -> Path:
    """The adapter's folder in a finished run, or the folder itself where it is one. Raises UserError otherwise."""
    if (directory / CONFIG_NAME).is_file():
        return directory
    run_dir.open_run(directory)
    return directory / run_dir.ADAPTER


def check_same_base(directory: Path, recipe: Recipe) -> None:
    """Raises UserError where a run, or that of an adapter's folder, was trained on other values of the same base.

    recipe: tells those that it would be put on. An adapter without a run does not tell, and is taken as it is.
    """
    run = directory.parent if directory.name == run_dir.ADAPTER else directory
    if not (run / run_dir.RECIPE).is_file():
        return
    theirs, ours = load_recipe(run / run_dir.RECIPE).base, recipe.base
    for key in ("quantization", "dtype"):
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"--against {directory}: was trained with base.{key}={getattr(theirs, key)}, and what is evaluated "
                f"with {getattr(ours, key)}: one base cannot serve both; evaluate each by itself"
            )


def load_whole(opened: OpenedBase, device: torch.device | str) -> PreTrainedModel:
    """The base, whole on one device, in eval mode."""
    return _ready(load_opened(opened, Unsharded(device)))


def load_sharded(opened: OpenedBase, config: dict[str, Any], device: torch.device) -> PreTrainedModel:
    """The base in shards of ZeRO-3 over all ranks, in eval mode. Every rank calls this together.

    A forward gathers a layer's parameters at a time: every rank must make as many forwards as the others, or they
    wait for ever. An adapter that is put on afterwards is whole on every rank. config: DeepSpeed's.
    """
    import deepspeed

    from trainer.distributed.zero3_sharding import Zero3Sharding

    base = _ready(load_opened(opened, Zero3Sharding(config, device)))
    engine, *_ = deepspeed.initialize(model=base, config=config)
    return engine.module.eval()


@contextlib.contextmanager
def with_adapter(base: PreTrainedModel, adapter: Path | None) -> Iterator[PreTrainedModel | PeftModel]:
    """The base under an adapter (None: bare), which is taken off again: adapters of any method, one after another."""
    if adapter is None:
        yield base
        return
    model = put_on(base, adapter)
    try:
        yield model
    finally:
        model.unload()


def put_on(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base under an adapter that does not change any more. Raises UserError where it is not whole."""
    model = load_adapter(base, adapter).eval()
    freeze_experts(model)
    return model


def _ready(base: PreTrainedModel) -> PreTrainedModel:
    # Generation gives the head a strided slice, for which a CPU would copy the head's weight once for every row.
    base.get_output_embeddings().register_forward_pre_hook(lambda _head, args: (args[0].contiguous(),))
    return base
