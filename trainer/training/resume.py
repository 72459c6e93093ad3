"""Where a run begins: at its first step, from a checkpoint of its own or another's, or not at all, being finished."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.differences import differences
from data_prep.user_error import UserError
from trainer.checkpoint import storage
from trainer.checkpoint.manager import FOLDER, read_facts
from trainer.recipe import Recipe
from trainer.run import run_dir
from trainer.run.launch_protocol import AGAIN

# Keys that may change between the parts of a run: they alter where and how fast it computes, not what.
HARMLESS = (
    "run.name",
    "run.output_dir",
    "run.nodes",
    "run.deterministic",
    "run.start_timeout",
    "run.collective_timeout",
    "base.attention",
    "experts",
    "data.prepared_dir",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.eval_every",
    "train.eval_rows",
    "train.early_stopping_patience",
    "train.resume",
    "deepspeed",
    "checkpoint",
    "report",
)


@dataclass(frozen=True)
class ResumePoint:
    """facts: run.json of the checkpoint, empty where the run begins anew. notes: lines to tell a person."""

    finished: bool = False
    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.facts.get("step", 0)

    def metrics_bytes(self, directory: Path) -> int:
        """Bytes of the directory's metrics.jsonl that tell of those steps; another run's checkpoint tells of none."""
        own = self.checkpoint is not None and _within(self.checkpoint, directory)
        return self.facts["metrics_bytes"] if own else 0


def _within(path: Path, directory: Path) -> bool:
    return path.resolve().is_relative_to(directory.resolve())


def find_resume_point(recipe: Recipe) -> ResumePoint:
    """What the run directory and train.resume say. Reads files only; on rank 0.

    Raises UserError where the directory is another's, or the recipe has changed in what a run learns.
    """
    resume_point = _find_resume_point(recipe)
    best = resume_point.facts.get("held_out", {}).get("best_step")
    if (
        not resume_point.facts
        or not recipe.checkpoint.keep_best
        or best in storage.steps_in(recipe.run.directory / FOLDER)
    ):
        return resume_point
    # A best that no checkpoint of this run can give back, as of the run it goes on from: any of its own is better.
    return replace(resume_point, facts={**resume_point.facts, "held_out": {}})


def _find_resume_point(recipe: Recipe) -> ResumePoint:
    found = run_dir.find(recipe)
    resume, directory = recipe.train.resume, recipe.run.directory
    if resume == "never" and AGAIN in os.environ:  # what the first start of this launch has left
        resume = "auto"
    notes: list[str] = []
    if found is not None:
        notes += accept_recipe_changes(
            found, recipe, f"{directory} holds a run of another recipe", run_dir.name_another(recipe)
        )
        if (directory / run_dir.ADAPTER).is_dir():
            return ResumePoint(finished=True)
    if resume == "never":
        if found is not None:
            raise UserError(
                f"train.resume=never: {directory} holds an unfinished run of this recipe; remove it, set train.resume="
                f"auto, or {run_dir.name_another(recipe)}"
            )
        return ResumePoint()
    if resume == "auto":
        return find_newest_checkpoint(directory / FOLDER, notes) if found is not None else ResumePoint()
    if found is not None and found.train.resume == resume:  # the same command again: the run has come further since
        own = find_newest_checkpoint(directory / FOLDER, list(notes))
        if own.checkpoint is not None:
            return own
    return _given(Path(resume), recipe, notes)


def find_newest_checkpoint(checkpoints: Path, notes: list[str]) -> ResumePoint:
    """From the newest whole checkpoint in a folder of them, or from the first step. notes: lines that come before."""
    for folder, problem in storage.newest_whole(checkpoints):
        if problem is None:
            facts = read_facts(folder)
            return ResumePoint(False, folder, facts, (*notes, f"resume          {folder}, at step {facts['step']}"))
        notes.append(f"warning: {folder} is passed over: {problem}")
    return ResumePoint(notes=(*notes, f"resume          no checkpoint in {checkpoints}: from the first step"))


def _given(path: Path, recipe: Recipe, notes: list[str]) -> ResumePoint:
    """From one checkpoint, or the newest of a run directory or a folder of checkpoints."""
    if not (path / storage.INDEX).is_file():
        inside = path / FOLDER if (path / FOLDER).is_dir() else path
        resume_point = find_newest_checkpoint(inside, notes)
        if resume_point.checkpoint is None:
            raise UserError(f"train.resume={path}: no whole checkpoint there; give a folder such as {path}/step-000100")
    else:
        if problem := storage.verify(path):
            raise UserError(f"train.resume={path}: {problem}; give another checkpoint, or train.resume=auto")
        facts = read_facts(path)
        resume_point = ResumePoint(False, path, facts, (*notes, f"resume          {path}, at step {facts['step']}"))
    _refuse_to_leave_behind(path, resume_point, recipe)
    old = Recipe.model_validate(resume_point.facts["recipe"])
    changes = accept_recipe_changes(
        old, recipe, f"train.resume={path} is of another recipe", "start from its adapter instead"
    )
    return ResumePoint(False, resume_point.checkpoint, resume_point.facts, (*changes, *resume_point.notes))


def _refuse_to_leave_behind(path: Path, resume_point: ResumePoint, recipe: Recipe) -> None:
    """A run that went back within its directory would have later checkpoints, and metrics, of another course."""
    later = [step for step in storage.steps_in(recipe.run.directory / FOLDER) if step > resume_point.step]
    if later:
        raise UserError(
            f"train.resume={path}: {recipe.run.directory} has a later checkpoint, of step {max(later)}; remove it, or "
            f"go on in a run of its own: {run_dir.name_another(recipe)}"
        )


def check_same_base_and_data(resume_point: ResumePoint, now: dict[str, Any]) -> None:
    """Raises UserError where the base or the prepared set is not what the checkpoint was trained on."""
    for key, what in (("base_fingerprint", "base.model"), ("prepared_key", "data.prepared_dir")):
        if resume_point.checkpoint is not None and resume_point.facts[key] != now[key]:
            raise UserError(
                f"{what} holds something else than when {resume_point.checkpoint} was saved; put that back, or start "
                "anew with train.resume=never and another run.name"
            )


def accept_recipe_changes(old: Recipe, new: Recipe, refusal: str, remedy: str) -> list[str]:
    """Lines about harmless changes. Raises UserError that begins with `refusal` and names those that are not."""
    lines, refused = [], []
    for key, before, now in differences(old.model_dump(mode="json"), new.model_dump(mode="json")):
        harmless = any(key == known or key.startswith(f"{known}.") for known in HARMLESS)
        (lines if harmless else refused).append(f"{key} was {before!r} and is {now!r}")
    if refused:
        raise UserError(f"{refusal}: {'; '.join(refused)}; undo that or {remedy}")
    return [f"changed         {line}" for line in lines]
