"""One cell in a process of its own: trains as `teamlora train` does, scores held-out items, writes what it found.

python -m benchmarks.quality.cell CELL BASE OUTPUT
"""

import json
import shutil
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import PeftModel
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.quality.settings import METHODS, TRIALS, VALIDATION, WORK, Cell, recipe_of
from data_prep.reader import open_prepared
from trainer.adapters.adapter_folder import save_adapter
from trainer.adapters.attach import attach_adapter
from trainer.adapters.layer import Experts
from trainer.adapters.router_observer import find_experts
from trainer.base.model_config import load_tokenizer
from trainer.base.weight_map import open_base
from trainer.console.library_logs import silence_libraries
from trainer.evaluation.generation import batches_by_length
from trainer.evaluation.likelihood import log_likelihoods
from trainer.evaluation.loaded_models import load_unsharded, with_adapter
from trainer.evaluation.runner import Questions, RunnerOptions, build_questions, run_items
from trainer.evaluation.scoring import metrics_of
from trainer.recipe import Recipe
from trainer.run import run_dir
from trainer.run.stop_signal import StopSignal
from trainer.telemetry.metrics import METRICS
from trainer.training.train import train

BATCH = 16


def run(cell: Cell, base: str) -> dict[str, Any]:
    """What training told of each step, and what the held-out items gave."""
    recipe = recipe_of(cell, base)
    found: dict[str, Any] = {}
    adapter = None
    if METHODS[cell.method].adapter is not None:
        shutil.rmtree(recipe.run.directory, ignore_errors=True)
        if cell.trial and (start := TRIALS[cell.trial].start):
            recipe = resume_point(recipe, start)
        started = time.monotonic()
        train(recipe, StopSignal())
        found = {"train_seconds": time.monotonic() - started, **trained(recipe.run.directory)}
        adapter = recipe.run.directory / run_dir.ADAPTER
    started = time.monotonic()
    tokenizer = load_tokenizer(recipe.base, recipe.data.chat_template)
    prepared, opened = open_prepared(recipe.data, tokenizer), open_base(recipe.base)
    found |= {"prepared_key": prepared.manifest["key"], "base_fingerprint": opened.fingerprint}
    asked = build_questions(chosen(prepared.items, cell.tuning), tokenizer, recipe.data)
    base_model = load_unsharded(opened, "cuda" if torch.cuda.is_available() else "cpu")
    with with_adapter(base_model, adapter) as model:
        if adapter is not None:
            found["parameters"] = sum(p.numel() for name, p in model.named_parameters() if is_adapters(name))
        found |= (losses if cell.tuning else scores)(model, asked, tokenizer)
    shutil.rmtree(recipe.run.directory, ignore_errors=True)
    return found | {"score_seconds": time.monotonic() - started}


@torch.no_grad()
def resume_point(recipe: Recipe, change: Callable[[Experts], Any]) -> Recipe:
    """The recipe, beginning with a fresh adapter's values changed."""
    torch.manual_seed(recipe.run.seed)
    model = attach_adapter(load_unsharded(open_base(recipe.base), "cpu"), recipe.adapter)
    for adapter in find_experts(model).values():
        change(adapter)
    folder = WORK / f"{recipe.run.name}-start"
    save_adapter(model, {name: p for name, p in model.named_parameters() if p.requires_grad}, folder)
    return recipe.model_copy(update={"adapter": recipe.adapter.model_copy(update={"init_from": folder})})


def is_adapters(name: str) -> bool:
    return "lora" in name.lower()


def trained(directory: Path) -> dict[str, Any]:
    """losses: nats a labelled token of each step; router: the last record's weights, by task too."""
    records = [json.loads(line) for line in (directory / METRICS).read_text().splitlines()]
    last = next((record for record in reversed(records) if "router_weight" in record), {})
    keys = ("router_weight", "router_weight_by_task", "router_entropy_share", "router_interaction_distance")
    return {
        "train_losses": [round(record["loss"], 5) for record in records],
        "tokens": sum(record["tokens"] for record in records),
        "router": {key: last[key] for key in keys if key in last},
    }


def chosen(items: Sequence[dict[str, Any]], validation: bool) -> list[dict[str, Any]]:
    """The first VALIDATION items of each task, or all the others."""
    tasks = dict.fromkeys(item["task"] for item in items)
    by_task = {task: [item for item in items if item["task"] == task] for task in tasks}
    part = slice(None, VALIDATION) if validation else slice(VALIDATION, None)
    return [item for mine in by_task.values() for item in mine[part]]


def losses(model: PreTrainedModel | PeftModel, asked: Questions, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """losses: by task, nats a token of the wanted answers."""
    totals = np.empty(len(asked.references))
    for batch in batches_by_length([len(text.ids) for text in asked.references], BATCH):
        totals[batch] = log_likelihoods(model, [asked.references[i] for i in batch], tokenizer.pad_token_id)
    return by_task(asked.items, -totals, [text.scored for text in asked.references])


def scores(model: PreTrainedModel | PeftModel, asked: Questions, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """scores: by task, each item's score by the task's metric, from 0 to 1; losses as above."""
    given = run_items(model, asked, RunnerOptions(tokenizer, BATCH, sharded=False))
    of_items: dict[str, list[float]] = {}
    metrics = metrics_of(asked.items)
    for item, one in zip(asked.items, given, strict=True):
        of_items.setdefault(item["task"], []).append(round(one[metrics[item["task"]]], 4))
    found = by_task(asked.items, [one["loss"] for one in given], [one["tokens"] for one in given])
    return {**found, "scores": of_items, "metrics": metrics}


def by_task(items: Sequence[dict[str, Any]], nats: Sequence[float], tokens: Sequence[int]) -> dict[str, Any]:
    tasks = np.array([item["task"] for item in items])
    means = {task: np.sum(nats, where=tasks == task) / np.sum(tokens, where=tasks == task) for task in set(tasks)}
    return {"losses": {str(task): round(float(means[task]), 5) for task in sorted(means)}}


def main(cell: str, base: str, output: str) -> None:
    silence_libraries()
    found = run(Cell(**json.loads(cell)), base)
    Path(output).write_text(json.dumps(found))


if __name__ == "__main__":
    main(*sys.argv[1:])
