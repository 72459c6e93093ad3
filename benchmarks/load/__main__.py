"""Loading a 4-bit base for ZeRO-3: each rank its own part (ours), against the usual way, whole and then sharded.

    python -m benchmarks.load [--full]

Builds a random Llama of 1.8 GB in bf16 in a temporary folder, then loads it in processes of their own that alternate:
from_pretrained with BitsAndBytesConfig and deepspeed.initialize, or our streaming load and deepspeed.initialize.
Memory is anonymous (RssAnon) above what the process had before, sampled every 2 ms by another process.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.support.random_llama import FILES, build_model
from tests.support.ranks import run_ranks


def load(way: str, folder: Path, world: int) -> list[dict[str, Any]]:
    """What each rank measured."""
    output = folder / f"{way}.json"
    run_ranks(world, ["-m", "benchmarks.load.rank", way, str(folder), str(output)])
    return json.loads(output.read_text())


def peak_over_resident(ranks: Sequence[dict[str, Any]]) -> float:
    """Of the worst rank."""
    return max(rank["peak"] / sum(rank["resident"].values()) for rank in ranks)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="5 alternations at 2 ranks instead of 2")
    repetitions = 5 if parser.parse_args(arguments).full else 2
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        size = build_model(folder)
        print(f"model of {size / 1e9:.2f} GB in bf16, {FILES} files")
        print("way    ranks  seconds  resident MB  peak MB  peak/resident  read MB")
        runs: dict[tuple[str, int], list] = {("ours", 1): [], ("ours", 2): [], ("usual", 2): [], ("ours", 4): []}
        for repetition in range(repetitions):
            for way in ("ours", "usual") if repetition % 2 == 0 else ("usual", "ours"):
                runs[way, 2].append(load(way, folder, 2))
                print(line(way, 2, runs[way, 2][-1]), flush=True)
        for world in (1, 4):
            runs["ours", world].append(load("ours", folder, world))
            print(line("ours", world, runs["ours", world][-1]), flush=True)
    print(json.dumps(summary(runs, size)))


def line(way: str, world: int, ranks: list[dict[str, Any]]) -> str:
    worst = max(ranks, key=lambda rank: rank["peak"])
    resident = sum(worst["resident"].values()) / 1e6
    read = f"{worst['read'] / 1e6:8.0f}" if worst["read"] else f"{'':8}"
    seconds = max(rank["seconds"] for rank in ranks)
    ratio = peak_over_resident(ranks)
    return f"{way:6} {world:5} {seconds:8.1f} {resident:12.0f} {worst['peak'] / 1e6:8.0f} {ratio:14.2f} {read}"


def summary(runs: dict[tuple[str, int], list], size: int) -> dict[str, Any]:
    seconds = {
        way: statistics.median(max(r["seconds"] for r in ranks) for ranks in runs[way, 2]) for way in ("ours", "usual")
    }
    resident = {world: sum(runs["ours", world][0][0]["resident"].values()) for world in (1, 2, 4)}
    read = {world: max(rank["read"] for rank in runs["ours", world][0]) for world in (2, 4)}
    return {
        "peak_over_resident": round(max(map(peak_over_resident, runs["ours", 2])), 3),
        "peak_over_resident_4": round(max(map(peak_over_resident, runs["ours", 4])), 3),
        "standard_peak_over_resident": round(max(map(peak_over_resident, runs["usual", 2])), 3),
        "time_over_standard": round(seconds["ours"] / seconds["usual"], 3),
        "resident_bytes": list(resident.values()),
        "resident_over_share": [round(n * bytes_ / resident[1], 4) for n, bytes_ in resident.items()],
        "read_bytes": list(read.values()),
        "read_over_share": [round(n * bytes_ / size, 4) for n, bytes_ in read.items()],
    }


if __name__ == "__main__":
    main()
