"""A finished run's adapter for other tools: as it is, as a plain LoRA, or merged into the base; and what that costs."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from data_prep.chat import ChatTemplate
from data_prep.publish import blame_option, publish_atomically
from data_prep.reader import PreparedSet, manifest_for, open_prepared
from data_prep.user_error import UserError
from trainer.base.base_fingerprint import BASE_FILE
from trainer.base.weight_map import open_base
from trainer.evaluation.generation import config_end_ids, template_end_ids
from trainer.evaluation.loaded_models import LoadedRun, load_run
from trainer.evaluation.runner import sample_per_task
from trainer.export.fidelity import TaskFidelity, measure, table
from trainer.export.load_exported import free_bytes, load_merged, load_plain_lora
from trainer.export.lora import LowRank, low_rank_updates, write_lora
from trainer.export.mean_gates import adapted_by_experts, calibration_rows, mean_gates
from trainer.export.merged import write_merged
from trainer.export.task_scores import scorer
from trainer.objective.batches import Batch, collate
from trainer.recipe import Recipe
from trainer.run import run_dir

EXPORT = "export.json"
ROWS = 64
ITEMS_PER_TASK = 20


@dataclass(frozen=True)
class Request:
    """What is wanted of a run.

    output: the folder to make; None: `export-lora` and the like in the run. task: the gates' mean is taken over its
    tokens alone. rows: at most so many for that mean, and for the price. items_per_task: held-out items a task that
    are asked for the scores in the price. base: what `merged` adds the update to.
    """

    run: Path
    to: Literal["peft", "lora", "merged"]
    output: Path | None = None
    task: str | None = None
    rows: int = ROWS
    items_per_task: int = ITEMS_PER_TASK
    base: Literal["original", "dequantised"] | None = None

    @property
    def folder(self) -> Path:
        return self.output or self.run / f"export-{self.to}{'-dequantised' if self.base == 'dequantised' else ''}"


@dataclass(frozen=True)
class Exported:
    """What was written. export.json holds `what`, `facts`, `measured` and `price`, by these names.

    measured: how the price was measured, or why not. price: None where it was not.
    """

    folder: Path
    what: str
    measured: str
    price: list[TaskFidelity] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return "\n".join([f"{self.folder}: {self.what}", self.measured, *([table(self.price)] if self.price else [])])


def export(request: Request) -> Exported:
    """Writes the folder under one rename, with export.json in it.

    Raises UserError where the run cannot be exported so.
    """
    recipe = run_dir.open_run(request.run)
    _check(request, recipe)
    with blame_option("--output", request.folder), publish_atomically(request.folder) as staging:
        exported = _as_it_is(request, staging) if request.to == "peft" else _with_fixed_gates(request, staging)
        written = {"run": str(request.run), "to": request.to, **asdict(exported)}
        del written["folder"]
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (staging / EXPORT).write_text(text, encoding="utf-8")
    return exported


def _check(request: Request, recipe: Recipe) -> None:
    """Everything that can be refused before the model is loaded."""
    if request.folder.exists():
        raise UserError(f"--output: {request.folder} exists; give another folder or remove it")
    if request.base is not None and request.to != "merged":
        raise UserError(f"--base {request.base}: --to {request.to} holds no base; remove it, or use --to merged")
    if request.base == "dequantised" and recipe.base.quantization != "nf4":
        raise UserError(
            f"--base dequantised: {request.run} was trained with base.quantization=none, so there is nothing to "
            "dequantise; use --base original"
        )
    if request.task is not None:
        _check_task(request, recipe)


def _check_task(request: Request, recipe: Recipe) -> None:
    if request.to == "peft":
        raise UserError(f"--task {request.task}: --to peft leaves the gates as they are; remove it")
    if recipe.adapter.method == "lora":
        raise UserError(f"--task {request.task}: {request.run} was trained as a plain LoRA, without gates; remove it")
    tasks = manifest_for(recipe.data)["tasks"]
    if request.task not in tasks:
        raise UserError(f"--task {request.task}: {request.run} has no such task; it has {', '.join(tasks)}")


def _as_it_is(request: Request, staging: Path) -> Exported:
    shutil.copytree(request.run / run_dir.ADAPTER, staging, dirs_exist_ok=True)
    what = "the adapter as it is; PEFT knows it after `import trainer.adapters`, so it needs this package"
    return Exported(request.folder, what, "nothing is lost")


def _with_fixed_gates(request: Request, staging: Path) -> Exported:
    """Writes what is wanted into `staging`, loads it from there and measures it."""
    run = load_run(request.run)
    prepared = open_prepared(run.recipe.data, run.tokenizer)
    gates = _gates(request, run, prepared)
    updates = low_rank_updates(run.model, gates)
    run.tokenizer.save_pretrained(str(staging))
    write = _write_lora if request.to == "lora" else _write_merged
    what, size = write(request, run, updates, staging)
    if gates:
        over = "all tasks" if request.task is None else f"task {request.task}"
        what += f"; gates fixed at their mean over {over} on at most {request.rows} rows"
    measured, price = _fidelity(request, run, prepared, staging, size)
    facts = {
        "base": request.base or "original",
        "task": request.task,
        "rows": request.rows,
        "gates": {name: omega.tolist() for name, omega in gates.items()},
    }
    return Exported(request.folder, what, measured, price, facts)


def _gates(request: Request, run: LoadedRun, prepared: PreparedSet) -> dict[str, Tensor]:
    """By the linear's name; none where the run is a plain LoRA."""
    if not adapted_by_experts(run.model):
        return {}
    task = None if request.task is None else prepared.tasks.index(request.task)
    rows = calibration_rows(prepared, request.rows, run.recipe.run.seed, task)
    return mean_gates(run.model, rows, task)


def _write_lora(request: Request, run: LoadedRun, updates: dict[str, LowRank], staging: Path) -> tuple[str, int]:
    write_lora(staging, updates, run.model.peft_config["default"])
    shutil.copy(request.run / run_dir.ADAPTER / BASE_FILE, staging)
    return f"a LoRA of rank {_rank(updates)} for plain PEFT, in fp32", 0


def _write_merged(request: Request, run: LoadedRun, updates: dict[str, LowRank], staging: Path) -> tuple[str, int]:
    """Also the bytes that a model of it takes."""
    dequantised = run.model.get_base_model() if request.base == "dequantised" else None
    size = write_merged(staging, open_base(run.recipe.base), updates, dequantised)
    _name_taught_end(run, staging)
    base = "base as NF4 keeps it, dequantised," if dequantised is not None else "original base"
    return f"the {base} with a LoRA of rank {_rank(updates)} merged, in {run.recipe.base.dtype}", size


def _name_taught_end(run: LoadedRun, folder: Path) -> None:
    """A chat template of the recipe's own may end answers with a token that the base's generation_config lacks."""
    if not run.tokenizer.chat_template:
        return
    named = config_end_ids(run.model)
    if missing := [end for end in template_end_ids(run.tokenizer, ChatTemplate(run.tokenizer)) if end not in named]:
        path = folder / GENERATION_CONFIG_NAME  # as JSON: transformers refuses to write what it reads of older models
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**config, "eos_token_id": [*named, *missing]}, indent=2) + "\n")


def _rank(updates: dict[str, LowRank]) -> int:
    return len(next(iter(updates.values())).a)


def _fidelity(
    request: Request, run: LoadedRun, prepared: PreparedSet, folder: Path, size: int
) -> tuple[str, list[TaskFidelity] | None]:
    """How it was measured, or why not, and the price of what lies in `folder`. size: bytes it takes beside the run."""
    rows = min(request.rows, len(prepared.held_out))
    if not rows:
        return "price not measured: the prepared set has no held-out rows", None
    if size > free_bytes(run.model.device):
        return f"price not measured: {size / 1e9:.1f} GB beside the run's own model do not fit into memory", None
    items = sample_per_task(prepared.items, request.items_per_task)
    try:
        exported = load_plain_lora(run, folder) if request.to == "lora" else load_merged(run, folder)
        price = measure(run.model, exported, _held_out(prepared, rows), prepared.tasks, scorer(run, items))
    except torch.OutOfMemoryError:
        return "price not measured: there is not enough memory on the GPU", None
    scored = f", {len(items)} items for the scores" if items else ""
    return f"{rows} held-out rows, nats a token{scored}; before: the run's own model; after: this export, loaded", price


def _held_out(prepared: PreparedSet, rows: int) -> Iterator[Batch]:
    """`rows` of the held-out rows, evenly spread: documents of a task may lie together."""
    for index in range(rows):
        yield collate([prepared.held_out[index * len(prepared.held_out) // rows]])
