"""TeamLoRA against LoRA, HydraLoRA and MoELoRA on the suite, over seeds, numbers of experts and shares of the data.

    python -m benchmarks.quality                    # runs cells that are missing, for 8 minutes; --minutes N, or --full
    python -m benchmarks.quality --table            # tables of what there is, and the numbers as JSON
    python -m benchmarks.quality --page             # puts tables and pictures of it into docs/results.md
    python -m benchmarks.quality --check-one SEED   # runs one random finished cell again and compares

Needs `bash launch/install.sh suite` and the sample base. A cell is one training and its scores, on one thread; as many
run at once as there are cores (--jobs N). Finished cells are JSON files in benchmarks/results/quality; each names the
commit and the recipe's hash, and mixed ones are refused. First come the learning rates of every method and the trials,
on one seed and validation items, then the cells that are compared, on other seeds and test items.
"""

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality import results
from benchmarks.quality.page import write_page
from benchmarks.quality.plan import compared_cells, trial_cells, tuning_cells
from benchmarks.quality.prepared import prepare_for
from benchmarks.quality.settings import TRAINED, Cell
from benchmarks.quality.tables import Compared, all_tables, numbers
from data_prep.resource_limits import available_memory, usable_cpus
from data_prep.user_error import UserError

DEFAULT_BASE = "bases/smollm2-135m-instruct"
CELL_BYTES = 3 * 2**30  # of memory, about
TOLERANCE = 0.01  # of a mean score, or of a loss in nats: other processors round otherwise


def missing_cells() -> list[Cell]:
    """In the order in which they are run. Learning rates come first: without them nothing can be compared."""
    done = results.load()
    rates = results.best_rates(done)
    cells = tuning_cells() if len(rates) < len(TRAINED) else [*trial_cells(rates), *compared_cells(rates)]
    return [cell for cell in cells if cell.name not in done]


class FailedCell(Exception):
    """What it said last."""


def run_missing(base: str, minutes: float, jobs: int) -> bool:
    """Runs cells until none is missing, `jobs` at once; begins none later than `minutes` from now.

    False where one failed, which keeps none of the others from being run.
    """
    ending = time.monotonic() + 60 * minutes
    while cells := missing_cells():
        prepare_for(cells[0], base)
        with ThreadPoolExecutor(jobs) as pool:
            ends = list(pool.map(lambda cell: run_and_save(cell, base, ending), cells))
        if ends.count("done") < len(ends):
            print(f"left: {ends.count('left')}, failed: {ends.count('failed')}; the same command goes on with them")
            return "failed" not in ends
    return True


def jobs_here() -> int:
    """As many as there are cores for this process, and memory."""
    return max(1, min(usable_cpus(), available_memory() // CELL_BYTES))


def run_and_save(cell: Cell, base: str, ending: float) -> Literal["done", "left", "failed"]:
    """left: it is too late to begin. Raises MixedResults where the cell would not go with the finished ones."""
    if time.monotonic() > ending:
        return "left"
    started, made = time.monotonic(), results.provenance(threads=1)
    to_come = results.Result(cell, {}, made)
    results.refuse_mixed({**results.load(), cell.name: to_come}, ("commit", "recipe"))  # before the time is spent
    try:
        found = run_cell(cell, base)
    except FailedCell as error:
        print(f"error: {error}", file=sys.stderr, flush=True)
        return "failed"
    if results.provenance(threads=1) != made:
        raise results.MixedResults(f"the code changed while {cell.name} ran; it is not kept")
    results.refuse_mixed({**results.load(), cell.name: results.Result(cell, found, made)})
    results.save(cell, found, made)
    print(f"{time.monotonic() - started:6.0f} s  {cell.name}", flush=True)
    return "done"


def run_cell(cell: Cell, base: str) -> dict[str, Any]:
    """In a process of its own, on the CPU. Raises FailedCell."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        command = [sys.executable, "-m", "benchmarks.quality.cell", json.dumps(cell.as_dict()), base, str(output)]
        env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        ended = subprocess.run(command, env=env, capture_output=True, text=True)
        if ended.returncode:
            raise FailedCell(
                f"{cell.name} ended with {ended.returncode}:\n{ended.stdout[-1000:]}{ended.stderr[-4000:]}"
            )
        return json.loads(output.read_text())


def show_tables() -> None:
    compared, speed = Compared(results.load()), results.load_speed()
    for name, text in all_tables(compared, speed):
        print(f"{name}\n\n{text}\n")
    print(json.dumps(numbers(compared, speed)))


def check_one(base: str, number: int) -> bool:
    """Runs the finished cell that `number` draws again, and tells how far its result is from the kept one."""
    kept = results.load()
    if not kept:
        raise results.MixedResults(f"{results.FOLDER}: no finished cell to check; run some first")
    drawn = kept[random.Random(number).choice(sorted(kept))]
    prepare_for(drawn.cell, base)
    again = results.Result(drawn.cell, run_cell(drawn.cell, base), {})
    measure = results.mean_loss if drawn.cell.tuning else results.mean_score
    before, now = measure(drawn), measure(again)
    print(f"{drawn.cell.name}: kept, of {drawn.made['commit'][:12]}: {before:.4f}; now: {now:.4f}")
    same = again.found.get("train_losses") == drawn.found.get("train_losses")
    if apart := abs(now - before) > TOLERANCE:
        print(f"error: they differ by more than {TOLERANCE}", file=sys.stderr)
    print(json.dumps({"kept": before, "now": now, "difference": now - before, "same_train_losses": int(same)}))
    return not apart


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--minutes", type=float, default=8.0, help="begin no cell later (default: %(default)s)")
    parser.add_argument("--jobs", type=int, help="cells at once; default: as cores and memory allow")
    parser.add_argument("--full", action="store_true", help="run all missing cells, hours")
    parser.add_argument("--check-one", type=int, metavar="SEED", help="run a random finished cell again and compare")
    parser.add_argument("--page", action="store_true", help="write tables and pictures into docs/results.md")
    parser.add_argument("--table", action="store_true", help="tables of the finished cells, and their numbers as JSON")
    options = parser.parse_args(arguments)
    try:
        if options.table:
            show_tables()
        elif options.page:
            write_page(Compared(results.load()), results.load_speed())
        elif options.check_one is not None:
            return 0 if check_one(options.base, options.check_one) else 1
        else:
            minutes = float("inf") if options.full else options.minutes
            return 0 if run_missing(options.base, minutes, options.jobs or jobs_here()) else 1
    except FailedCell as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except (results.MixedResults, UserError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
