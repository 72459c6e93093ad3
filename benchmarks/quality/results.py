"""Finished cells as JSON files, each with the commit and the recipe's hash that it is of."""

import json
import os
import platform
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.quality.plan import LEARNING_RATES, tuning_cells
from benchmarks.quality.settings import TRAINED, Cell, recipe_hash
from data_prep.publish import write_atomically

FOLDER = Path("benchmarks/results/quality")
SPEED = Path("benchmarks/results/quality_speed.json")
# What a cell's numbers depend on; its commit is the last that changed any of it.
CODE = ("trainer", "data_prep", "ds_configs", "launch/recipes", "constraints.txt")
CODE += ("benchmarks/quality/settings.py", "benchmarks/quality/cell.py")


class MixedResults(Exception):
    """Cells of several commits or recipes, or no cells: no table is made of them."""


@dataclass(frozen=True)
class Result:
    """A finished cell. found: what `benchmarks.quality.cell` wrote; made: commit, recipe hash and machine."""

    cell: Cell
    found: dict[str, Any]
    made: dict[str, Any]


MADE_OF = {
    "commit": lambda result: result.made["commit"],
    "recipe": lambda result: result.made["recipe"],
    "base": lambda result: result.found["base_fingerprint"],
    "prepared set": lambda result: result.found["prepared_key"],
}


def save(cell: Cell, found: dict[str, Any], made: dict[str, Any], folder: Path = FOLDER) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"cell": cell.as_dict(), "made": made, "found": found}, separators=(",", ":"))
    write_atomically(folder / f"{cell.name}.json", text + "\n")


def load(folder: Path = FOLDER) -> dict[str, Result]:
    """By the cell's name. Raises MixedResults where they are not all of one commit, recipe, base and prepared set."""
    results = {}
    for path in sorted(folder.glob("*.json")):
        entry = json.loads(path.read_text())
        results[path.stem] = Result(Cell(**entry["cell"]), entry["found"], entry["made"])
    refuse_mixed(results)
    return results


def refuse_mixed(results: dict[str, Result], keys: Sequence[str] = tuple(MADE_OF)) -> None:
    """Raises MixedResults where they differ in one of these keys."""
    for key in keys:
        names: dict[str, list[str]] = {}
        for name, result in results.items():
            names.setdefault(MADE_OF[key](result), []).append(name)
        if len(names) > 1:
            told = "; ".join(f"{value[:12]}: {len(cells)} cells such as {cells[0]}" for value, cells in names.items())
            raise MixedResults(f"cells of more than one {key} ({told}); keep those of one, or work on its commit")


def save_speed(found: dict[str, Any]) -> None:
    SPEED.parent.mkdir(parents=True, exist_ok=True)
    SPEED.write_text(json.dumps(found, indent=1) + "\n")


def load_speed() -> dict[str, Any] | None:
    """What `benchmarks.quality.speed` found, if it was run: a run of its own, which names its own commit."""
    return json.loads(SPEED.read_text()) if SPEED.is_file() else None


def provenance(threads: int) -> dict[str, Any]:
    """Raises MixedResults where the code differs from the commit that the cells would name."""
    changed = _git("status", "--porcelain", "--", *CODE)
    if changed:
        raise MixedResults(f"uncommitted changes: {' '.join(changed.split())}; commit them, since cells name a commit")
    machine = {"processor": platform.processor() or platform.machine(), "cores": os.cpu_count(), "threads": threads}
    commit = _git("log", "-1", "--format=%H", "--", *CODE)
    return {"commit": commit, "recipe": recipe_hash(), "torch": torch.__version__, **machine}


def best_rates(results: dict[str, Result]) -> dict[str, float]:
    """By method the learning rate of least mean validation loss over tasks; of the methods whose rates are all done."""
    rates = {}
    for method in TRAINED:
        mine = [cell for cell in tuning_cells() if cell.method == method and cell.name in results]
        if len(mine) == len(LEARNING_RATES):
            rates[method] = min(mine, key=lambda cell: mean_loss(results[cell.name])).learning_rate
    return rates


def mean_loss(result: Result) -> float:
    """Over tasks, nats a token of the wanted answers."""
    return mean(list(result.found["losses"].values()))


def mean_score(result: Result) -> float:
    """Over tasks, which count alike."""
    return mean([mean(scores) for scores in result.found["scores"].values()])


def mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _git(*words: str) -> str:
    done = subprocess.run(["git", *words], check=True, capture_output=True, text=True)
    return done.stdout.strip()
