"""The checkpoints of one run: what each holds beside tensors, which are kept, and which is the best."""

import json
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
    """Saves into `folder` what `saver` holds, and facts of the run as JSON beside it. On every rank."""

    saver: AsyncSaver
    folder: Path
    config: CheckpointConfig

    def save(self, step: int, facts: dict[str, Any], best: int | None) -> None:
        """Every rank takes part; returns once the state is copied. best: the step with the least held-out loss."""
        self.saver.save(
            start=partial(self._start, step, json.dumps(facts)),
            finish=partial(self._finish, step, best),
            name=storage.folder_name(step),
        )

    def _start(self, step: int, facts: str) -> storage.CheckpointWriter:
        draft = storage.CheckpointWriter(self.folder, step)
        draft.add(FACTS, facts.encode())
        return draft

    def _finish(self, step: int, best: int | None, draft: storage.CheckpointWriter) -> None:
        draft.publish()
        kept = []
        if self.config.keep_best:
            steps = storage.steps_in(self.folder)
            before = storage.read_pointer(self.folder, storage.BEST)
            kept = [each for each in (best, before) if each in steps][:1]  # the one before, where a save has failed
        for each in kept:
            storage.point(self.folder, storage.BEST, storage.folder_name(each))
        storage.prune(self.folder, step, self.config.keep_last, self.config.keep_every, kept)


def find_best(checkpoints: Path) -> tuple[int | None, str]:
    """The step of the whole checkpoint that `best` names, or None; and a line that tells a person of it, or why not."""
    step = storage.read_pointer(checkpoints, storage.BEST)
    if step is None:
        return None, f"warning: {checkpoints} names no best checkpoint; the adapter is that of the last step"
    folder = checkpoints / storage.folder_name(step)
    if problem := storage.verify(folder):
        return None, f"warning: {folder} is the best, but {problem}; the adapter is that of the last step"
    loss = read_facts(folder)["held_out"]["best_loss"]
    return step, f"best            step {step}, held-out loss {loss:.4f}: the adapter is that of this step"


def read_facts(checkpoint: Path) -> dict[str, Any]:
    """What `save` was given. Raises OSError or ValueError."""
    return json.loads((checkpoint / FACTS).read_text())
