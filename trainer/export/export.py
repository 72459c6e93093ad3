"""Exports a finished run's adapter for other tools: as it is, as a plain LoRA, or merged into the base."""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor
from transformers.utils import GENERATION_CONFIG_NAME

from data_prep.chat import ChatTemplate
from data_prep.publish import blame_option, publish_atomically
from data_prep.reader import PreparedSet, manifest_for, open_prepared
from data_prep.user_error import UserError
from trainer.adapters.adapter_folder import drop_default_keys
from trainer.base.base_fingerprint import BASE_FILE
from trainer.base.model_folder import resolve_folder
from trainer.base.weight_map import describe_unplaced, open_base
from trainer.evaluation.generation import config_end_ids, template_end_ids
from trainer.evaluation.loaded_models import LoadedRun, load_run
from trainer.evaluation.runner import sample_per_task
from trainer.export.base_files import copy_code, copy_tokenizer
from trainer.export.fidelity import TaskFidelity, fidelity_table, item_scorer, measure
from trainer.export.load_exported import free_bytes, load_merged, load_plain_lora
from trainer.export.lora import LowRank, low_rank_updates, write_lora
from trainer.export.mean_gates import adapted_by_experts, calibration_rows, mean_gates
from trainer.export.merged import write_merged
from trainer.objective.batches import Batch, collate
from trainer.recipe import Recipe
from trainer.run import run_dir

EXPORT = "export.json"
ROWS = 64
ITEMS_PER_TASK = 20


@dataclass(frozen=True)
class ExportRequest:
    """output: the folder to create; None: `export-lora` or similar in the run. task: averages the gates over the tokens
    of this task only. rows: limit for that mean, and for measuring fidelity. items_per_task: held-out items for the
    scores in the fidelity. base: what `merged` adds the update to.
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
    """What was written.

    measured: how the fidelity was measured, or why it was not. fidelity: None if it was not measured.
    """

    folder: Path
    what: str
    measured: str
    fidelity: list[TaskFidelity] | None = None
    facts: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        table = [fidelity_table(self.fidelity)] if self.fidelity else []
        return "\n".join([f"{self.folder}: {self.what}", self.measured, *table])

    def as_dict(self) -> dict[str, Any]:
        """As in export.json, where `fidelity` has the key `price`."""
        lines = None if self.fidelity is None else [asdict(line) for line in self.fidelity]
        return {"what": self.what, "measured": self.measured, "price": lines, "facts": self.facts}


def export(request: ExportRequest) -> Exported:
    """Writes the folder, including export.json, and publishes it by one rename.

    Raises UserError if the run cannot be exported in this form.
    """
    recipe = run_dir.open_run(request.run)
    _check(request, recipe)
    with blame_option("--output", request.folder), publish_atomically(request.folder) as staging:
        exported = _copy_adapter(request, staging) if request.to == "peft" else _export_low_rank(request, staging)
        written = {"run": str(request.run), "to": request.to, **exported.as_dict()}
        text = json.dumps(written, indent=2, ensure_ascii=False) + "\n"
        (staging / EXPORT).write_text(text, encoding="utf-8")
    return exported


def _check(request: ExportRequest, recipe: Recipe) -> None:
    """Refuses what can be refused before the model is loaded."""
    if request.folder.exists():
        raise UserError(f"--output: {request.folder} exists; give another folder or remove it")
    if request.base is not None and request.to != "merged":
        raise UserError(f"--base {request.base}: --to {request.to} writes no base; remove it, or use --to merged")
    if request.base == "dequantised" and recipe.base.quantization != "nf4":
        raise UserError(
            f"--base dequantised: {request.run} was trained with base.quantization=none, so there is nothing to "
            "dequantize; use --base original"
        )
    if request.task is not None:
        _check_task(request, recipe)


def _check_task(request: ExportRequest, recipe: Recipe) -> None:
    if request.to == "peft":
        raise UserError(f"--task {request.task}: --to peft keeps the gates as they are; remove it")
    if recipe.adapter.method == "lora":
        raise UserError(
            f"--task {request.task}: {request.run} was trained with adapter.method=lora, which has no gates; remove it"
        )
    tasks = manifest_for(recipe.data)["tasks"]
    if request.task not in tasks:
        raise UserError(f"--task {request.task}: {request.run} has no such task; it has {', '.join(tasks)}")


def _copy_adapter(request: ExportRequest, staging: Path) -> Exported:
    shutil.copytree(request.run / run_dir.ADAPTER, staging, dirs_exist_ok=True)
    drop_default_keys(staging)  # runs of older code have them
    what = "the adapter as it is, for PEFT after `import trainer.adapters`, so it needs this package"
    return Exported(request.folder, what, "exact: nothing was changed")


def _export_low_rank(request: ExportRequest, staging: Path) -> Exported:
    """Writes a plain LoRA or a merged model into `staging`, loads it from there, and measures its fidelity."""
    run = load_run(request.run)
    prepared = open_prepared(run.recipe.data, run.tokenizer)
    gates = _gates(request, run, prepared)
    updates = low_rank_updates(run.model, gates)
    _copy_tokenizer(run, staging)
    write = _write_lora if request.to == "lora" else _write_merged
    what, size, kept = write(request, run, updates, staging)
    if gates:
        over = "all tasks" if request.task is None else f"task {request.task}"
        what += f"; gates fixed at their mean over {over} on at most {request.rows} rows"
    measured, fidelity = _measure(request, run, prepared, staging, size)
    facts = {
        "base": request.base or "original",
        "task": request.task,
        "rows": request.rows,
        "gates": {name: omega.tolist() for name, omega in gates.items()},
        "kept_as_they_are": kept,
    }
    return Exported(request.folder, what, measured, fidelity, facts)


def _gates(request: ExportRequest, run: LoadedRun, prepared: PreparedSet) -> dict[str, Tensor]:
    """Mean gates by the linear's name; {} if the run is a plain LoRA."""
    if not adapted_by_experts(run.model):
        return {}
    task = None if request.task is None else prepared.tasks.index(request.task)
    rows = calibration_rows(prepared, request.rows, run.recipe.run.seed, task)
    return mean_gates(run.model, rows, task)


def _copy_tokenizer(run: LoadedRun, staging: Path) -> None:
    base = resolve_folder(run.recipe.base)
    template = cast(str, run.tokenizer.chat_template) if run.recipe.data.chat_template is not None else None
    copy_tokenizer(base, staging, run.tokenizer, template)
    if run.recipe.base.trust_remote_code:
        copy_code(base, staging)


def _write_lora(
    request: ExportRequest, run: LoadedRun, updates: dict[str, LowRank], staging: Path
) -> tuple[str, int, list[str]]:
    write_lora(staging, updates, run.model.peft_config["default"])
    shutil.copy(request.run / run_dir.ADAPTER / BASE_FILE, staging)
    return f"a LoRA of rank {_rank(updates)} for plain PEFT, in fp32", 0, []


def _write_merged(
    request: ExportRequest, run: LoadedRun, updates: dict[str, LowRank], staging: Path
) -> tuple[str, int, list[str]]:
    """Returns a description, the bytes that the exported model takes in memory, and the tensors kept as they are."""
    dequantized = run.model.get_base_model() if request.base == "dequantised" else None
    opened = open_base(run.recipe.base)
    size = write_merged(staging, opened, updates, dequantized)
    _add_template_end(run, staging)
    base = "base dequantized from NF4" if dequantized is not None else "original base"
    what = f"the {base} with a LoRA of rank {_rank(updates)} merged, in {run.recipe.base.dtype}"
    if opened.unplaced:
        what += f"; {describe_unplaced(opened)} are kept as they are"
    return what, size, list(opened.unplaced)


def _add_template_end(run: LoadedRun, folder: Path) -> None:
    """Adds the chat template's end token to generation_config.json, if it is missing.

    A chat template from the recipe may end answers with a token that the base's configuration lacks.
    """
    if not run.tokenizer.chat_template:
        return
    known = config_end_ids(run.model)
    if missing := [end for end in template_end_ids(run.tokenizer, ChatTemplate(run.tokenizer)) if end not in known]:
        path = folder / GENERATION_CONFIG_NAME  # as JSON: transformers refuses to write some older files
        config = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**config, "eos_token_id": [*known, *missing]}, indent=2) + "\n")


def _rank(updates: dict[str, LowRank]) -> int:
    return len(next(iter(updates.values())).a)


def _measure(
    request: ExportRequest, run: LoadedRun, prepared: PreparedSet, folder: Path, size: int
) -> tuple[str, list[TaskFidelity] | None]:
    """How fidelity was measured, or why not; and that of `folder`. size: bytes needed beside the run's model."""
    rows = min(request.rows, len(prepared.held_out))
    if not rows:
        return "fidelity not measured: the prepared set has no held-out rows", None
    if size > free_bytes(run.model.device):
        return f"fidelity not measured: {size / 1e9:.1f} GB beside the run's own model do not fit into memory", None
    items = sample_per_task(prepared.items, request.items_per_task)
    try:
        exported = load_plain_lora(run, folder) if request.to == "lora" else load_merged(run, folder)
        fidelity = measure(run.model, exported, _held_out(prepared, rows), prepared.tasks, item_scorer(run, items))
    except torch.OutOfMemoryError:
        return "fidelity not measured: out of GPU memory", None
    scored = f", {len(items)} items for the scores" if items else ""
    measured = f"{rows} held-out rows, nats per token{scored}; before: the run's own model; after: this export, loaded"
    return measured, fidelity


def _held_out(prepared: PreparedSet, rows: int) -> Iterator[Batch]:
    """`rows` held-out rows, evenly spread, since neighboring documents may share a task."""
    for index in range(rows):
        yield collate([prepared.held_out[index * len(prepared.held_out) // rows]])
