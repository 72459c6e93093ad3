"""A training step of ours (TeamLoRA, k=4) against TRL's SFTTrainer (PEFT LoRA of the same total rank).

    python -m benchmarks.step [BASE] [--full]

Both sides train the same rows with the same labels on the same NF4 base, ZeRO-3 on 2 ranks, one thread a rank, in
processes of their own that alternate, once with every token labelled and once with 25 % of them. The persistence
threshold is 0 on both sides, the better value for each (100,000, DeepSpeed's default, costs ours 15 % and TRL 6 %).
TRL needs the extra `benchmark`: bash launch/install.sh test,benchmark.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.shared.processor import device_name
from benchmarks.step.setting import DEFAULT_BASE, WARM_UP, Setting, run_side, write_rows

WORLD = 2
# name of a case: share of labelled tokens
CASES = {"all": 1.0, "quarter": 0.25}


def compare(base: str, rows: Path, setting: Setting, repetitions: int) -> dict[str, list[float]]:
    """Median speed of each run of either side, in the order of alternations."""
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    for repetition in range(repetitions):
        for side in ("ours", "trl") if repetition % 2 == 0 else ("trl", "ours"):
            found = run_side(side, base, rows, setting, WORLD)
            speeds[side].append(statistics.median(setting.tokens_per_second(found)))
    return speeds


def line(name: str, speeds: dict[str, list[float]]) -> str:
    ratios = sorted(ours / trl for ours, trl in zip(speeds["ours"], speeds["trl"], strict=True))
    ours, trl = (statistics.median(speeds[side]) for side in ("ours", "trl"))
    return f"{name:8} {CASES[name]:9.0%} {ours:6.1f} {trl:6.1f} {ours / trl:6.2f}  {ratios[0]:.2f} to {ratios[-1]:.2f}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--full", action="store_true", help="5 alternations of 20 steps instead of 2 of 8")
    options = parser.parse_args(arguments)
    repetitions, steps = (5, 20) if options.full else (2, 8)
    setting = Setting(steps=WARM_UP + steps)
    print("tokens a second a rank, medians")
    print("case      labelled   ours    TRL  ratio  of each alternation")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, labelled in CASES.items():
            rows = Path(folder) / name
            write_rows(options.base, labelled, setting.seq_len, rows)
            speeds = compare(options.base, rows, setting, repetitions)
            print(line(name, speeds), flush=True)
            found[f"step_over_trl_{name}"] = round(
                statistics.median(speeds["ours"]) / statistics.median(speeds["trl"]), 3
            )
    print(json.dumps({**found, "device": device_name(), "trl": version("trl"), "ranks": WORLD, "threads": 1}))


if __name__ == "__main__":
    main()
