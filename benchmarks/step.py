"""A training step of ours (TeamLoRA, k=4) against TRL's SFTTrainer (PEFT LoRA of the same total rank).

    python -m benchmarks.step [BASE] [--full]

Both sides train the same rows with the same labels on the same NF4 base, ZeRO-3 on 2 ranks, one thread a rank, in
processes of their own that alternate. Two settings: every token labelled with one persistence threshold for both,
and 25 % labelled with each side's best threshold. TRL needs the extra `benchmark`: pip install -e .[benchmark].
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import torch

from benchmarks.ranks import run_ranks

TARGETS = ["gate_proj", "up_proj", "down_proj"]
WORLD = 2
WARM_UP = 2  # steps not counted
ROWS = 64
DEFAULT_BASE = "bases/smollm2-135m-instruct"


@dataclass(frozen=True)
class Setting:
    """What one run of either side is given. persistence_threshold: elements below which ZeRO-3 keeps a tensor whole."""

    total_rank: int = 32
    seq_len: int = 256
    micro_batch_size: int = 2
    steps: int = WARM_UP + 8
    persistence_threshold: int = 100_000


@dataclass(frozen=True)
class Case:
    """Two sides to compare: `labelled` is the share of labelled tokens."""

    name: str
    labelled: float
    ours: Setting
    trl: Setting


def cases(steps: int) -> list[Case]:
    same = Setting(steps=WARM_UP + steps)
    best = replace(same, persistence_threshold=0)
    return [Case("all", 1.0, same, same), Case("quarter", 0.25, best, same)]


def write_rows(base: str, labelled: float, seq_len: int, folder: Path) -> None:
    """Rows of `seq_len` real tokens, one document each; the last share of each row is labelled."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    text = (Path(__file__).parent.parent / "LICENSE").read_text()
    ids = tokenizer(text)["input_ids"]
    stream = np.resize(np.array(ids), ROWS * seq_len).reshape(ROWS, seq_len)
    first = seq_len - round(labelled * seq_len)
    labels = np.where(np.arange(seq_len) >= max(first, 1), stream, -100)
    columns = {
        "input_ids": stream.tolist(),
        "labels": labels.tolist(),
        "position_ids": [list(range(seq_len))] * ROWS,
        "task_ids": [[0] * seq_len] * ROWS,
    }
    Dataset.from_dict(columns).save_to_disk(folder)


def run_side(side: str, base: str, rows: Path, setting: Setting, output: Path) -> list[float]:
    """Tokens a second a rank of each counted step."""
    run_ranks(WORLD, ["-m", f"benchmarks.step_{side}", base, str(rows), json.dumps(asdict(setting)), str(output)])
    seconds = json.loads(output.read_text())["seconds"][WARM_UP:]
    return [setting.micro_batch_size * setting.seq_len / s for s in seconds]


def compare(base: str, case: Case, repetitions: int, folder: Path) -> dict[str, list[float]]:
    rows = folder / case.name
    write_rows(base, case.labelled, case.ours.seq_len, rows)
    speeds: dict[str, list[float]] = {"ours": [], "trl": []}
    for repetition in range(repetitions):
        sides = [("ours", case.ours), ("trl", case.trl)]
        for side, setting in sides if repetition % 2 == 0 else reversed(sides):
            found = run_side(side, base, rows, setting, folder / f"{side}.json")
            speeds[side].append(statistics.median(found))
    return speeds


def line(case: Case, speeds: dict[str, list[float]]) -> str:
    ratios = sorted(ours / trl for ours, trl in zip(speeds["ours"], speeds["trl"], strict=True))
    ours, trl = (statistics.median(speeds[side]) for side in ("ours", "trl"))
    thresholds = f"{case.ours.persistence_threshold:>9,} {case.trl.persistence_threshold:>15,}"
    spread = f"{ratios[0]:.2f} to {ratios[-1]:.2f}"
    return f"{case.name:8} {case.labelled:9.0%}  {thresholds} {ours:6.1f} {trl:6.1f} {ours / trl:6.2f}  {spread}"


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--full", action="store_true", help="5 alternations of 20 steps instead of 2 of 8")
    options = parser.parse_args(arguments)
    repetitions, steps = (5, 20) if options.full else (2, 8)
    print("tokens a second a rank, medians; threshold: elements ZeRO-3 keeps whole")
    print("case      labelled  threshold TRL's threshold   ours    TRL  ratio  of each alternation")
    found = {}
    with tempfile.TemporaryDirectory() as folder:
        for case in cases(steps):
            speeds = compare(options.base, case, repetitions, Path(folder))
            print(line(case, speeds), flush=True)
            found[f"step_over_trl_{case.name}"] = round(
                statistics.median(speeds["ours"]) / statistics.median(speeds["trl"]), 3
            )
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({**found, "device": device, "trl": version("trl"), "ranks": WORLD, "threads": 1}))


if __name__ == "__main__":
    main()
