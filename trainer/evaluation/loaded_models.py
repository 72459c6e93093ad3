"""Loads models to evaluate: one base, bare or with a finished run's adapter, whole on one device or sharded."""

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
from trainer.distributed.parallelize import shard_for_inference
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run import run_dir
from trainer.run.gpu import compute_device

CausalLM = PreTrainedModel | PeftModel


@dataclass(frozen=True)
class LoadedRun:
    """A finished run in one process: its base whole on one device, with its adapter."""

    recipe: Recipe
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase


def load_run(directory: Path) -> LoadedRun:
    """Raises UserError where there is no finished run, or its base or this machine's GPU cannot be used."""
    device = compute_device()
    recipe = run_dir.open_run(directory)
    adapter = directory / run_dir.ADAPTER
    opened = open_base(recipe.base)
    check_base_file(adapter, recipe.base.model, opened.fingerprint)
    base = load_unsharded(opened, device)
    return LoadedRun(recipe, apply_adapter(base, adapter), load_tokenizer(recipe.base, recipe.data.chat_template))


def open_subject(directory: Path, recipe: Path | None) -> tuple[Recipe, Path]:
    """What to evaluate: the recipe that names base and data, and the adapter folder.

    directory: a finished run, which has its own recipe, or an adapter folder, which needs `recipe`.
    Raises UserError if it is neither, or the recipe is missing.
    """
    if recipe is not None:
        return load_recipe(recipe), find_adapter(directory)
    if (directory / CONFIG_NAME).is_file() and not (directory / run_dir.RECIPE).is_file():
        raise UserError(f"{directory}: an adapter folder names no held-out data; give --recipe RECIPE as well")
    return run_dir.open_run(directory), directory / run_dir.ADAPTER


def find_adapter(directory: Path) -> Path:
    """The adapter folder of a finished run, or `directory` itself if it is one. Raises UserError otherwise."""
    if (directory / CONFIG_NAME).is_file():
        return directory
    run_dir.open_run(directory)
    return directory / run_dir.ADAPTER


def check_same_base(directory: Path, recipe: Recipe) -> None:
    """Raises UserError if a run, or the run of an adapter folder, was trained with another precision of the base.

    recipe: that of the base to load. An adapter without a run does not record its precision and is accepted.
    """
    run = directory.parent if directory.name == run_dir.ADAPTER else directory
    if not (run / run_dir.RECIPE).is_file():
        return
    theirs, ours = load_recipe(run / run_dir.RECIPE).base, recipe.base
    for key in ("quantization", "dtype"):
        if getattr(theirs, key) != getattr(ours, key):
            raise UserError(
                f"--against {directory}: trained with base.{key}={getattr(theirs, key)}, but the evaluated model with "
                f"{getattr(ours, key)}; one base cannot serve both; evaluate each separately"
            )


def load_unsharded(opened: OpenedBase, device: torch.device | str) -> PreTrainedModel:
    """The base, whole on one device, in eval mode."""
    return _with_contiguous_head_input(load_opened(opened, Unsharded(device)))


def load_sharded(opened: OpenedBase, config: dict[str, Any], shards: Zero3Sharding) -> PreTrainedModel:
    """`shard_for_inference`, ready to generate. Collective: every rank must call it."""
    return _with_contiguous_head_input(shard_for_inference(opened, config, shards))


@contextlib.contextmanager
def with_adapter(base: PreTrainedModel, adapter: Path | None) -> Iterator[CausalLM]:
    """Within, the base has an adapter (None: bare). Removed afterwards, so adapters of any method can follow."""
    if adapter is None:
        yield base
        return
    model = apply_adapter(base, adapter)
    try:
        yield model
    finally:
        model.unload()


def apply_adapter(base: PreTrainedModel, adapter: Path) -> PeftModel:
    """The base with an adapter for inference only. Raises UserError if the adapter is incomplete."""
    model = load_adapter(base, adapter).eval()
    freeze_experts(model)
    return model


def _with_contiguous_head_input(base: PreTrainedModel) -> PreTrainedModel:
    # Generation passes the head a strided slice, for which a CPU would copy the head's weight once per row.
    base.get_output_embeddings().register_forward_pre_hook(lambda _head, args: (args[0].contiguous(),))
    return base
