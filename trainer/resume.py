"""Where a run begins: at its first step, from a checkpoint of its own or another's, or not at all, being finished."""

import os
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from data_prep.errors import UserError
from trainer import rundir
from trainer.checkpoint import files
from trainer.checkpoint.checkpoints import FOLDER, read_facts
from trainer.launch_protocol import AGAIN
from trainer.recipe import Recipe, differences

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
class Beginning:
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


def find_beginning(recipe: Recipe) -> Beginning:
    """What the run directory and train.resume say. Reads files only; on rank 0.

    Raises UserError where the directory is another's, or the recipe has changed in what a run learns.
    """
    beginning = _find_beginning(recipe)
    best = beginning.facts.get("held_out", {}).get("best_step")
    if not beginning.facts or not recipe.checkpoint.keep_best or best in files.steps_in(recipe.run.directory / FOLDER):
        return beginning
    # A best that no checkpoint of this run can give back, as of the run it goes on from: any of its own is better.
    return replace(beginning, facts={**beginning.facts, "held_out": {}})


def _find_beginning(recipe: Recipe) -> Beginning:
    found = rundir.find(recipe)
    resume, directory = recipe.train.resume, recipe.run.directory
    if resume == "never" and AGAIN in os.environ:  # what the first start of this launch has left
        resume = "auto"
    notes: list[str] = []
    if found is not None:
        notes += accept_changes(
            found, recipe, f"{directory} holds a run of another recipe", rundir.name_another(recipe)
        )
        if (directory / rundir.ADAPTER).is_dir():
            return Beginning(finished=True)
    if resume == "never":
        if found is not None:
            raise UserError(
                f"train.resume=never: {directory} holds an unfinished run of this recipe; remove it, set train.resume="
                f"auto, or {rundir.name_another(recipe)}"
            )
        return Beginning()
    if resume == "auto":
        return find_newest(directory / FOLDER, notes) if found is not None else Beginning()
    if found is not None and found.train.resume == resume:  # the same command again: the run has come further since
        own = find_newest(directory / FOLDER, list(notes))
        if own.checkpoint is not None:
            return own
    return _given(Path(resume), recipe, notes)


def find_newest(checkpoints: Path, notes: list[str]) -> Beginning:
    """From the newest whole checkpoint in a folder of them, or from the first step. notes: lines that come before."""
    for folder, problem in files.newest_good(checkpoints):
        if problem is None:
            facts = read_facts(folder)
            return Beginning(False, folder, facts, (*notes, f"resume          {folder}, at step {facts['step']}"))
        notes.append(f"warning: {folder} is passed over: {problem}")
    return Beginning(notes=(*notes, f"resume          no checkpoint in {checkpoints}: from the first step"))


def _given(path: Path, recipe: Recipe, notes: list[str]) -> Beginning:
    """From one checkpoint, or the newest of a run directory or a folder of checkpoints."""
    if not (path / files.INDEX).is_file():
        inside = path / FOLDER if (path / FOLDER).is_dir() else path
        beginning = find_newest(inside, notes)
        if beginning.checkpoint is None:
            raise UserError(f"train.resume={path}: no whole checkpoint there; give a folder such as {path}/step-000100")
    else:
        if problem := files.damage(path):
            raise UserError(f"train.resume={path}: {problem}; give another checkpoint, or train.resume=auto")
        facts = read_facts(path)
        beginning = Beginning(False, path, facts, (*notes, f"resume          {path}, at step {facts['step']}"))
    _refuse_to_leave_behind(path, beginning, recipe)
    old = Recipe.model_validate(beginning.facts["recipe"])
    changes = accept_changes(old, recipe, f"train.resume={path} is of another recipe", "start from its adapter instead")
    return Beginning(False, beginning.checkpoint, beginning.facts, (*changes, *beginning.notes))


def _refuse_to_leave_behind(path: Path, beginning: Beginning, recipe: Recipe) -> None:
    """A run that went back within its directory would have later checkpoints, and metrics, of another course."""
    later = [step for step in files.steps_in(recipe.run.directory / FOLDER) if step > beginning.step]
    if later:
        raise UserError(
            f"train.resume={path}: {recipe.run.directory} has a later checkpoint, of step {max(later)}; remove it, or "
            f"go on in a run of its own: {rundir.name_another(recipe)}"
        )


def check_ground(beginning: Beginning, now: dict[str, Any]) -> None:
    """Raises UserError where the base or the prepared set is not what the checkpoint was trained on."""
    for key, what in (("base_fingerprint", "base.model"), ("prepared_key", "data.prepared_dir")):
        if beginning.checkpoint is not None and beginning.facts[key] != now[key]:
            raise UserError(
                f"{what} holds something else than when {beginning.checkpoint} was saved; put that back, or start "
                "anew with train.resume=never and another run.name"
            )


def accept_changes(old: Recipe, new: Recipe, refusal: str, remedy: str) -> list[str]:
    """Lines about harmless changes. Raises UserError that begins with `refusal` and names those that are not."""
    lines, refused = [], []
    for key, before, now in differences(old.model_dump(mode="json"), new.model_dump(mode="json")):
        harmless = any(key == known or key.startswith(f"{known}.") for known in HARMLESS)
        (lines if harmless else refused).append(f"{key} was {before!r} and is {now!r}")
    if refused:
        raise UserError(f"{refusal}: {'; '.join(refused)}; undo that or {remedy}")
    return [f"changed         {line}" for line in lines]
