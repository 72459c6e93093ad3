"""The checkpoints of one run: what each holds beside tensors, which ones are kept, and which is the best."""

import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from trainer.checkpoint import storage
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.recipe import CheckpointConfig

FOLDER = "checkpoints"
FACTS = "run.json"


@dataclass(frozen=True)
class CheckpointManager:
    """Saves the state that `saver` holds into `folder`, and facts of the run as JSON beside it. On every rank.

    before_write: is called on rank 0, before each save is begun and before it is published.
    """

    saver: AsyncSaver
    folder: Path
    config: CheckpointConfig
    before_write: Callable[[], None] = lambda: None

    def save(self, step: int, facts: dict[str, Any], best: int | None) -> None:
        """Returns once the state is copied. best: the step with the lowest held-out loss.

        Collective: every rank must call it.
        """
        self.saver.save(
            start=partial(self._start, step, json.dumps(facts)),
            finish=partial(self._finish, step, best),
            name=storage.folder_name(step),
        )

    def _start(self, step: int, facts: str) -> storage.CheckpointWriter:
        self.before_write()
        writer = storage.CheckpointWriter(self.folder, step)
        writer.add(FACTS, facts.encode())
        return writer

    def _finish(self, step: int, best: int | None, writer: storage.CheckpointWriter) -> None:
        self.before_write()
        writer.publish()
        kept = []
        if self.config.keep_best:
            steps = storage.steps_in(self.folder)
            before = storage.read_pointer(self.folder, storage.BEST)
            kept = [each for each in (best, before) if each in steps][:1]  # the one before, where a save has failed
        for each in kept:
            storage.point(self.folder, storage.BEST, storage.folder_name(each))
        storage.prune(self.folder, step, self.config.keep_last, self.config.keep_every, kept)


def find_best(checkpoints: Path) -> tuple[int | None, str]:
    """The step of the intact checkpoint that `best` names, or None; and a line that says which, or why none."""
    step = storage.read_pointer(checkpoints, storage.BEST)
    if step is None:
        return None, f"warning: {checkpoints} names no best checkpoint; the adapter is that of the last step"
    folder = checkpoints / storage.folder_name(step)
    if problem := storage.verify(folder):
        return None, f"warning: {folder} is the best, but {problem}; the adapter is that of the last step"
    loss = read_facts(folder)["held_out"]["best_loss"]
    return step, f"best            step {step}, held-out loss {loss:.4f}: the adapter is that of this step"


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """The facts that `save` was given. Raises OSError or ValueError."""
    return json.loads((checkpoint / FACTS).read_text(encoding="utf-8"))
