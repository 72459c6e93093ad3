"""What seeing the routers costs a training step, at the default interval.

    python -m benchmarks.telemetry [BASE] [--ranks N] [--steps N]

One engine trains TeamLoRA (k=4) on q, k, v, o, gate, up and down of an NF4 base under ZeRO-3, with six tasks in the
rows; every other step measures its routers, and all write their metrics and TensorBoard's as a run does. Pictures are
drawn several times to learn what one drawing costs. The step's overhead is (measured - plain) / interval / plain; the
pictures' is what `RouterImages` lets them take at that cost: at most its SHARE, and the first import of matplotlib,
which it counts too. The balance loss is off, so that all of the measuring is there for seeing.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch

from benchmarks.step.setting import DEFAULT_BASE, write_rows
from tests.support.ranks import run_ranks

SEQ_LEN = 256


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--ranks", type=int, default=1, metavar="N", help="of one thread each; default: 1")
    parser.add_argument("--steps", type=int, default=40, metavar="N", help="half of them measured; default: 40")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        write_rows(options.base, 1.0, SEQ_LEN, rows)
        words = ["-m", "benchmarks.telemetry.rank", options.base, str(rows), str(options.steps), folder]
        run_ranks(options.ranks, words)
        found = json.loads((Path(folder) / "found.json").read_text())
    print(report(found, options.ranks))


def report(found: dict, ranks: int) -> str:
    """The table and the last line."""
    plain, measured = (np.array(found[kind]) for kind in ("plain", "measured"))
    typical, interval = statistics.median(plain), found["interval"]
    # neighbours in time, so that what else the machine does is much the same for both
    ratios = measured / plain
    middle = statistics.median(ratios)
    low, high = np.quantile(ratios, (0.25, 0.75))
    error = (high - low) / 1.35 * 1.25 / len(ratios) ** 0.5  # of a median, from the quartiles
    drawing, share = statistics.median(found["drawings"]), found["share"]
    step_overhead = (middle - 1) / interval
    apart = max(interval, drawing / share / typical)
    pictures = drawing / (apart * typical)
    overhead = step_overhead + pictures
    lines = [
        f"plain step              {typical:8.3f} s, median of {len(plain)}",
        f"measured over plain     {middle:8.4f}   quartiles {low:.4f} to {high:.4f}, error of the median {error:.4f}",
        f"one drawing             {drawing:8.3f} s, first {found['drawings'][0]:.3f}; one in {apart:.0f} steps",
        f"overhead, one in {interval:2d}     {overhead:8.2%}   steps {step_overhead:.2%} (+- {error / interval:.2%}), "
        f"pictures {pictures:.2%}",
    ]
    numbers = {
        "overhead": round(overhead, 5),
        "overhead_of_steps": round(step_overhead, 5),
        "overhead_of_pictures": round(pictures, 5),
        "measured_over_plain": round(middle, 4),
        "measured_over_plain_quartiles": [round(float(low), 4), round(float(high), 4)],
        "step_seconds": round(typical, 3),
        "drawing_seconds": round(drawing, 3),
        "interval": interval,
        "ranks": ranks,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    return "\n".join([*lines, json.dumps(numbers)])


if __name__ == "__main__":
    main()
