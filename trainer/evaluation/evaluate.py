"""What a run has learned: its scores by task on its held-out items, against the bare base and other runs."""

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
from trainer.distributed.rank_check import raise_on_all_ranks
from trainer.evaluation.evaluation_report import Evaluation, write, write_tensorboard
from trainer.evaluation.loaded_models import (
    check_same_base,
    find_adapter,
    load_sharded,
    load_whole,
    open_subject,
    with_adapter,
)
from trainer.evaluation.runner import RunnerOptions, ask, questions, some_of_each_task
from trainer.evaluation.summary import SUBJECT, summarise
from trainer.objective.batches import plan_batches
from trainer.recipe import DeepSpeedConfig, Recipe
from trainer.run import run_dir
from trainer.telemetry.metrics import METRICS

BASE = "base"  # among the baselines: the bare base
LONGEST_WAIT = timedelta(hours=12)  # of a rank that is done for one that still has batches


@dataclass(frozen=True)
class EvaluateRequest:
    """What a person asks for. deepspeed: a ZeRO-3 configuration to share the base out over the ranks by, or None."""

    directory: Path
    recipe: Path | None
    against: Sequence[str]
    items_per_task: int
    batch_size: int
    deepspeed: Path | None


def evaluate(wanted: EvaluateRequest) -> Evaluation | None:
    """Asks the run's model and each baseline for the run's held-out items, on the ranks that a launcher started.

    Writes evaluation.json into the run, and TensorBoard's scalars where the run has some. Gives the evaluation on rank
    0, None on the others. Raises UserError, on every rank, for a person's mistake.
    """
    recipe, adapter = open_subject(wanted.directory, wanted.recipe)
    baselines = _baselines(wanted.against, recipe)
    with (
        process_group(timedelta(seconds=recipe.run.start_timeout)) as device,
        translate_peer_errors("evaluating"),
    ):
        set_collective_timeout(LONGEST_WAIT)
        found = _evaluate(wanted, recipe, {**baselines, SUBJECT: adapter}, device)
        if dist.get_rank() > 0:
            return None
        _keep(found, wanted.directory, recipe.report.tensorboard)
        return found


def _keep(found: Evaluation, directory: Path, tensorboard: bool) -> None:
    """In the run's folder. Where that cannot be written the caller still has it all, after hours perhaps."""
    try:
        write(found, directory)
        if tensorboard and (directory / METRICS).is_file():
            write_tensorboard(found, directory)
    except OSError as error:
        print(
            f"warning: {directory} cannot be written ({error.strerror}); nothing is kept", file=sys.stderr, flush=True
        )


def _evaluate(
    wanted: EvaluateRequest, recipe: Recipe, models: dict[str, Path | None], device: torch.device
) -> Evaluation:
    with raise_on_all_ranks():
        config = None if wanted.deepspeed is None else _zero3_config(recipe, wanted.deepspeed)
        opened = open_base(recipe.base)
        for adapter in filter(None, models.values()):
            check_base_file(adapter, recipe.base.model, opened.fingerprint)
        tokenizer = load_tokenizer(recipe.base, recipe.data.chat_template)
        items = some_of_each_task(open_prepared(recipe.data, tokenizer).items, wanted.items_per_task)
        if not items:
            raise UserError(f"{recipe.data.prepared_dir}: no held-out items; set data.held_out and prepare again")
        asked = questions(items, tokenizer, recipe.data)
    base = load_whole(opened, device) if config is None else load_sharded(opened, config, device)
    asking = RunnerOptions(tokenizer, wanted.batch_size, sharded=config is not None)
    found = {}
    for name, adapter in models.items():
        with with_adapter(base, adapter) as model:
            found[name] = ask(model, asked, asking)
    *tasks, mean = summarise(items, found)
    answered = [{**item, "models": {name: found[name][i] for name in found}} for i, item in enumerate(items)]
    folders = {name: str(adapter) if adapter else None for name, adapter in models.items() if name != SUBJECT}
    return Evaluation(folders, tasks, mean, answered)


def _baselines(against: Sequence[str], recipe: Recipe) -> dict[str, Path | None]:
    """By the name in the table; a run has its folder's, or its whole path where another has the same.

    recipe: of what is evaluated, whose base they are put on.
    """
    found: dict[str, Path | None] = {}
    for word in against:
        if word == BASE:
            found[BASE] = None
            continue
        adapter = find_adapter(Path(word))
        check_same_base(Path(word), recipe)
        run = Path(word).resolve()
        name = run.parent.name if run.name == run_dir.ADAPTER else run.name
        found[word if name in found or name in (BASE, SUBJECT) else name] = adapter
    return found


def _zero3_config(recipe: Recipe, path: Path) -> dict[str, Any]:
    world = dist.get_world_size()
    recipe = recipe.model_copy(update={"deepspeed": DeepSpeedConfig(config=path)})
    config = read_deepspeed_config(recipe, plan_batches(world, 1, world))
    if config["zero_optimization"].get("stage") != 3:
        raise UserError(
            f"--deepspeed {path}: only ZeRO stage 3 shares a base out; give a file such as ds_configs/zero3.json, or "
            "leave it out where the base fits each rank"
        )
    check_sharded_base(config, path)
    return config
