"""Evaluates a finished run: its scores by task on its held-out items, against the bare base and other runs."""

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from trainer.base.base_fingerprint import check_base_file
from trainer.base.model_config import load_tokenizer
from trainer.base.weight_map import open_base
from trainer.distributed.deepspeed_config import check_sharded_base, read_deepspeed_config
from trainer.distributed.process_group import process_group, set_collective_timeout, translate_peer_errors
from trainer.distributed.rank_check import gather_local_ranks, raise_on_all_ranks
from trainer.distributed.rank_groups import base_shard_group
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.evaluation.asked_items import acquaintances
from trainer.evaluation.evaluation_report import Evaluation, write_json, write_tensorboard
from trainer.evaluation.loaded_models import (
    check_same_base,
    find_adapter,
    load_sharded,
    load_unsharded,
    open_subject,
    with_adapter,
)
from trainer.evaluation.runner import RunnerOptions, build_questions, run_items, sample_per_task
from trainer.evaluation.summary import SUBJECT, summarize
from trainer.objective.batches import plan_batches
from trainer.recipe import DeepSpeedConfig, Recipe
from trainer.run import run_dir

BASE = "base"  # among the baselines: the bare base
COLLECTIVE_TIMEOUT = timedelta(hours=12)  # a rank that is done waits for the ranks that still have batches


@dataclass(frozen=True)
class EvaluateRequest:
    """directory: a finished run, or an adapter folder, which needs `recipe`. deepspeed: a ZeRO-3 configuration that
    shards the base over the ranks; None: each rank holds it whole."""

    directory: Path
    recipe: Path | None
    against: Sequence[str]
    items_per_task: int
    batch_size: int
    deepspeed: Path | None


def evaluate(request: EvaluateRequest) -> Evaluation | None:
    """Runs the run's model and each baseline on the run's held-out items, on all ranks of the launcher.

    Writes evaluation.json into the run, and TensorBoard scalars if the run has metrics. Returns the evaluation on
    rank 0, None on the others. Raises UserError, on every rank, for a user's mistake.
    """
    recipe, adapter = open_subject(request.directory, request.recipe)
    baselines = _baselines(request.against, recipe)
    with (
        process_group(timedelta(seconds=recipe.run.start_timeout)) as device,
        translate_peer_errors("evaluating"),
    ):
        set_collective_timeout(COLLECTIVE_TIMEOUT)
        evaluation = _evaluate(request, recipe, {**baselines, SUBJECT: adapter}, device)
        if dist.get_rank() > 0:
            return None
        _write(evaluation, request.directory, recipe.report.tensorboard)
        return evaluation


def _write(evaluation: Evaluation, directory: Path, tensorboard: bool) -> None:
    """Warns if the run cannot be written: the caller still prints the result of what may be hours of work."""
    try:
        write_json(evaluation, directory)
        if tensorboard:
            write_tensorboard(evaluation, directory)
    except OSError as error:
        print(
            f"warning: {directory} cannot be written ({error.strerror}); the evaluation is not saved",
            file=sys.stderr,
            flush=True,
        )


def _evaluate(
    request: EvaluateRequest, recipe: Recipe, models: dict[str, Path | None], device: torch.device
) -> Evaluation:
    with raise_on_all_ranks():
        config = None if request.deepspeed is None else _zero3_config(recipe, request.deepspeed)
        opened = open_base(recipe.base)
        for folder in filter(None, models.values()):
            check_base_file(folder, recipe.base.model, opened.fingerprint)
        tokenizer = load_tokenizer(recipe.base, recipe.data.chat_template)
        prepared = open_prepared(recipe.data, tokenizer)
        items = sample_per_task(prepared.items, request.items_per_task)
        if not items:
            raise UserError(f"{recipe.data.prepared_dir}: no held-out items; set data.held_out and prepare again")
        questions = build_questions(items, tokenizer, recipe.data)
        known = acquaintances(models, prepared.manifest["key"], items)
    if config is None:
        base = load_unsharded(opened, device)
    else:
        size = _shard_group(recipe, config, gather_local_ranks())
        base = load_sharded(opened, config, Zero3Sharding(config, device, size))
    options = RunnerOptions(tokenizer, request.batch_size, sharded=config is not None)
    results = {}
    for name, adapter in models.items():
        with with_adapter(base, adapter) as model:
            results[name] = run_items(model, questions, options)
    *tasks, mean = summarize(items, results)
    answered = [{**item, "models": {name: results[name][i] for name in results}} for i, item in enumerate(items)]
    folders = {name: str(adapter) if adapter else None for name, adapter in models.items() if name != SUBJECT}
    return Evaluation(folders, known, tasks, mean, answered)


def _baselines(against: Sequence[str], recipe: Recipe) -> dict[str, Path | None]:
    """Adapter folders by display name: the run folder's name, or the path as given if that name is taken.

    recipe: the subject's, whose base all adapters are applied to.
    """
    baselines: dict[str, Path | None] = {}
    for word in against:
        if word == BASE:
            baselines[BASE] = None
            continue
        adapter = find_adapter(Path(word))
        check_same_base(Path(word), recipe)
        run = Path(word).resolve()
        name = run.parent.name if run.name == run_dir.ADAPTER else run.name
        baselines[word if name in baselines or name in (BASE, SUBJECT) else name] = adapter
    return baselines


def _shard_group(recipe: Recipe, config: dict[str, Any], local_ranks: Sequence[int]) -> int:
    """As training groups ranks, where these can be grouped so; they may be fewer, and are then one group."""
    try:
        return base_shard_group(recipe.base, local_ranks, config, recipe.deepspeed.config)
    except UserError:
        return len(local_ranks)


def _zero3_config(recipe: Recipe, path: Path) -> dict[str, Any]:
    world = dist.get_world_size()
    recipe = recipe.model_copy(update={"deepspeed": DeepSpeedConfig(config=path)})
    config = read_deepspeed_config(recipe, plan_batches(world, 1, world))
    if config["zero_optimization"].get("stage") != 3:
        raise UserError(
            f"--deepspeed {path}: only ZeRO stage 3 shards a base; give a file such as ds_configs/zero3.json, or "
            "leave it out if the base fits on each rank"
        )
    check_sharded_base(config, path)
    return config
