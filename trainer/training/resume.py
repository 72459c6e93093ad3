"""Where a run starts: at its first step, from a checkpoint of its own or of another run, or nowhere, being finished."""

import contextlib
import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.differences import differences
from data_prep.user_error import UserError
from trainer.checkpoint import storage
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.manager import FOLDER, read_facts
from trainer.distributed.rank_check import raise_on_all_ranks
from trainer.recipe import Recipe
from trainer.run import run_dir
from trainer.run.launch_protocol import AGAIN
from trainer.training.trainer import Trainer

# Keys that may change when a run resumes: they alter where and how fast it computes, not what it learns.
MAY_CHANGE = (
    "run.name",
    "run.output_dir",
    "run.nodes",
    "run.deterministic",
    "run.debug",
    "run.start_timeout",
    "run.collective_timeout",
    "base.attention",
    "base.shard_group",
    "adapter.shard_group",
    "experts",
    "data.prepared_dir",
    "train.micro_batch_size",
    "train.activation_checkpointing",
    "train.loss_chunk",
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
    """facts: run.json of the checkpoint, empty at the first step. notes: lines to print."""

    finished: bool = False
    checkpoint: Path | None = None
    facts: dict[str, Any] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    @property
    def step(self) -> int:
        """Steps that are done."""
        return self.facts.get("step", 0)

    def is_of(self, directory: Path) -> bool:
        """Whether the checkpoint is one of the directory's own, whose metrics.jsonl has those steps.

        The directory, its checkpoints/ and every checkpoint may be links to folders elsewhere.
        """
        if self.checkpoint is None:
            return False
        own = directory / FOLDER / storage.folder_name(self.step)
        return own.exists() and own.samefile(self.checkpoint)


def contents(directory: Path) -> dict[Path, int]:
    """{path: time} of files and folders in a run directory and its checkpoints/: equal ones if nobody trained since."""
    found: dict[Path, int] = {}
    for folder in (directory, directory / FOLDER):
        with contextlib.suppress(OSError):
            found |= {path: path.lstat().st_mtime_ns for path in folder.iterdir() if not path.name.startswith(".")}
    return found


def find_resume_point(recipe: Recipe) -> ResumePoint:
    """Decides by the run directory and train.resume. Only reads files; call it on rank 0.

    Raises UserError where the directory belongs to another run, or the recipe has changed in what is learned.
    """
    resume_point = _find_resume_point(recipe)
    best = resume_point.facts.get("held_out", {}).get("best_step")
    if (
        not resume_point.facts
        or not recipe.checkpoint.keep_best
        or best in storage.steps_in(recipe.run.directory / FOLDER)
    ):
        return resume_point
    # The best checkpoint is not in this run's folder (it resumes another run): the next held-out loss is the best.
    return replace(resume_point, facts={**resume_point.facts, "held_out": {}})


def _find_resume_point(recipe: Recipe) -> ResumePoint:
    found = run_dir.find(recipe)
    resume, directory = recipe.train.resume, recipe.run.directory
    if resume == "never" and AGAIN in os.environ:  # the first start of this launch made it
        resume = "auto"
    notes: list[str] = []
    if found is not None:
        notes += accept_recipe_changes(
            found, recipe, f"{directory} holds a run of another recipe", run_dir.name_another(recipe)
        )
        if run_dir.is_finished(directory):
            return ResumePoint(finished=True)
    _refuse_broken_link(directory / FOLDER)
    _refuse_folders_for_pointers(directory / FOLDER)
    if resume == "never":
        if found is not None:
            raise UserError(
                f"train.resume=never: {directory} holds an unfinished run of this recipe; remove it, set train.resume="
                f"auto, or {run_dir.name_another(recipe)}"
            )
        return ResumePoint()
    if resume == "auto":
        return find_newest_checkpoint(directory / FOLDER, notes) if found is not None else ResumePoint()
    if found is not None and found.train.resume == resume:  # the same command again, and the run has trained on since
        own = find_newest_checkpoint(directory / FOLDER, list(notes))
        if own.checkpoint is not None:
            return own
    return _given(Path(resume), recipe, notes)


def _refuse_broken_link(checkpoints: Path) -> None:
    """Raises UserError for a link to a folder that is not there, as while a disk is not mounted."""
    if checkpoints.is_symlink() and not checkpoints.is_dir():
        raise UserError(
            f"{checkpoints} is a link to {checkpoints.readlink()}, which is no folder here; mount or make it, or "
            "remove the link to begin without checkpoints"
        )


def _refuse_folders_for_pointers(checkpoints: Path) -> None:
    """Raises UserError where every save would fail after its folder is there, and older ones would stay."""
    for name in (storage.LATEST, storage.BEST):
        path = checkpoints / name
        if path.is_dir() and not path.is_symlink():
            raise UserError(
                f"{path} is a folder, but the run writes the name of a checkpoint into a file {name}; rename the folder"
            )


def find_newest_checkpoint(checkpoints: Path, notes: list[str]) -> ResumePoint:
    """The newest intact checkpoint in a folder of them, or the first step. notes: lines to print before."""
    for folder, problem in storage.newest_intact(checkpoints):
        if problem is None:
            facts = read_facts(folder)
            return ResumePoint(False, folder, facts, (*notes, f"resume          {folder}, at step {facts['step']}"))
        notes.append(f"warning: {folder} is skipped: {problem}")
    return ResumePoint(notes=(*notes, f"resume          no checkpoint in {checkpoints}: from the first step"))


def _given(path: Path, recipe: Recipe, notes: list[str]) -> ResumePoint:
    """One checkpoint, or the newest of a run directory or of a folder of checkpoints."""
    if not (path / storage.INDEX).is_file():
        inside = path / FOLDER if (path / FOLDER).is_dir() else path
        resume_point = find_newest_checkpoint(inside, notes)
        if resume_point.checkpoint is None:
            raise UserError(
                f"train.resume={path}: no intact checkpoint there; give a folder such as {path}/step-000100"
            )
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
    """A run that went back within its directory would keep later checkpoints and metrics of steps it trains again."""
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
                f"{what} holds something else than when {resume_point.checkpoint} was saved; restore it, or start a "
                "new run with train.resume=never and another run.name"
            )


def find_again_if_changed(
    resume_point: ResumePoint, before: dict[Path, int], recipe: Recipe, identity: dict[str, Any]
) -> ResumePoint:
    """Call it on rank 0 with the run's lease: until then another launch may have trained.

    before: contents of the run directory when the resume point was found. Raises UserError as the functions above do.
    """
    if contents(recipe.run.directory) != before:
        resume_point = find_resume_point(recipe)
        check_same_base_and_data(resume_point, identity)
    return resume_point


def restore(resume_point: ResumePoint, saver: AsyncSaver, trainer: Trainer) -> None:
    """Loads the checkpoint of a resume point that has one. Collective: every rank must call it.

    Raises UserError where its tensors do not fit the adapter.
    """
    checkpoint = resume_point.checkpoint
    assert checkpoint is not None
    with raise_on_all_ranks():
        problem = saver.check(checkpoint) if dist.get_rank() == 0 else None
        if problem is not None:
            raise UserError(f"train.resume: {checkpoint} is of another adapter ({problem}); remove it")
    saver.restore(checkpoint, resume_point.step)
    trainer.load_state(resume_point.facts)


def accept_recipe_changes(old: Recipe, new: Recipe, refusal: str, remedy: str) -> list[str]:
    """Lines about changes that are allowed. Raises a UserError that begins with `refusal` and names the others."""
    lines: list[str] = []
    refused: list[str] = []
    for key, before, now in differences(old.model_dump(mode="json"), new.model_dump(mode="json")):
        allowed = any(key == known or key.startswith(f"{known}.") for known in MAY_CHANGE)
        (lines if allowed else refused).append(f"{key} was {before!r} and is {now!r}")
    if refused:
        raise UserError(f"{refusal}: {'; '.join(refused)}; undo that or {remedy}")
    return [f"changed         {line}" for line in lines]
