"""Preparation of chat documents against the bare tokenizer on the same text, its memory, and how full its rows are.

    python -m benchmarks.prepare [BASE] [--documents N] [--repetitions N]

Documents of one to three exchanges, of lognormal length with a median of 200 tokens, made of English from Python's own
help texts. Both sides use all cores: preparation with a process a core, the tokenizer with its own threads. Each run is
a process of its own, the two sides alternate, and neither counts its imports. Memory is the anonymous memory of all
processes of a preparation at its highest, on N documents and on a tenth as many. `long_over_short` is the time to
render an agent trace of 400 turns over one of 40 turns.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import psutil
import yaml

DEFAULT_BASE = "bases/smollm2-135m-instruct"
MEDIAN_TOKENS, SIGMA = 200, 1.0  # of the lognormal; the template's system turn included, as tokens of a document are
WORDS_A_TOKEN = 0.62  # of these texts and the sample base's tokenizer
SEQ_LEN = 2048
SAMPLED_EVERY = 0.02  # seconds


def write_documents(path: Path, count: int, seed: int) -> None:
    """A JSONL file of conversations in chat form, every one different."""
    from pydoc_data.topics import topics

    words = " ".join(topics.values()).split()
    chance = np.random.default_rng(seed)
    lengths = np.maximum(6, chance.lognormal(np.log(MEDIAN_TOKENS * WORDS_A_TOKEN), SIGMA, count)).astype(int)
    with path.open("w", encoding="utf-8") as file:
        for index, length in enumerate(lengths):
            turns = 2 * int(chance.integers(1, 4))
            start = chance.integers(0, len(words), turns)
            part = max(1, length // turns)
            contents = [" ".join(words[s : s + part]) for s in start]
            contents[0] = f"{index}. {contents[0]}"
            roles = ("user", "assistant") * (turns // 2)
            messages = [{"role": r, "content": c or "Yes."} for r, c in zip(roles, contents, strict=True)]
            file.write(json.dumps({"messages": messages}, ensure_ascii=False) + "\n")


def write_recipe(folder: Path, base: str, documents: Path) -> Path:
    recipe = {
        "run": {"name": "prepare"},
        "base": {"model": str(Path(base).resolve())},
        "data": {
            "prepared_dir": str(folder / f"prepared-{documents.stem}"),
            "seq_len": SEQ_LEN,
            "held_out": 0.01,
            "sources": [{"type": "files", "task": "chat", "path": str(documents)}],
        },
        "train": {"steps": 1, "global_batch_size": 1, "micro_batch_size": 1},
        "deepspeed": {"config": "ds_configs/single.json"},
    }
    path = folder / f"{documents.stem}.yaml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def measured(side: str, recipe: Path) -> dict[str, float]:
    """Runs one side in a process of its own (benchmarks/prepare/side.py); what it printed, and its peak memory."""
    command = [sys.executable, "-m", "benchmarks.prepare.side", side, str(recipe)]
    threads = {**os.environ, "TOKENIZERS_PARALLELISM": str(side == "tokenizer").lower()}
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=threads) as process:
        peak, watched = 0, psutil.Process(process.pid)
        while process.poll() is None:
            peak = max(peak, anonymous_memory(watched))
            time.sleep(SAMPLED_EVERY)
        output = process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with {process.returncode}")
    return {**json.loads(output.splitlines()[-1]), "peak": peak}


def anonymous_memory(process: psutil.Process) -> int:
    """RssAnon of a process and all below it, in bytes."""
    total = 0
    for one in (process, *_children(process)):
        try:
            status = Path(f"/proc/{one.pid}/status").read_text()
        except OSError:
            continue  # ended meanwhile
        total += sum(int(line.split()[1]) * 1024 for line in status.splitlines() if line.startswith("RssAnon"))
    return total


def _children(process: psutil.Process) -> list[psutil.Process]:
    try:
        return process.children(recursive=True)
    except psutil.NoSuchProcess:
        return []


def seconds_of_command(recipe: Path) -> float:
    started = time.perf_counter()
    command = [sys.executable, "-m", "trainer", "prepare", str(recipe)]
    output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    if "was kept" not in output:
        raise RuntimeError(f"prepared anew where nothing had changed: {output}")
    return time.perf_counter() - started


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE)
    parser.add_argument("--documents", type=int, default=50_000)
    parser.add_argument("--repetitions", type=int, default=4)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        recipes = []
        for count in (options.documents // 10, options.documents):
            documents = folder / f"documents-{count}.jsonl"
            write_documents(documents, count, seed=count)
            recipes.append(write_recipe(folder, options.base, documents))
        small, large = recipes
        print(f"{'':20}{'seconds':>9}{'tokens/s':>12}{'peak MB':>9}")
        peaks, rounds = [], []
        for _ in range(options.repetitions):
            peaks.append(measured("prepare", small)["peak"])
            rounds.append({side: measured(side, large) for side in ("tokenizer", "prepare")})
            for side, run in rounds[-1].items():
                print_run(side, run)
        cached = [seconds_of_command(large) for _ in range(3)]
        long_over_short = measured("long_conversations", large)["ratio"]
    ratios = [r["tokenizer"]["seconds"] / r["prepare"]["seconds"] for r in rounds]
    growth = statistics.median(r["prepare"]["peak"] for r in rounds) / statistics.median(peaks) - 1
    print(f"{'a tenth of it':41}{statistics.median(peaks) / 1e6:9.0f}")
    print(f"throughput over the tokenizer's: {min(ratios):.2f} to {max(ratios):.2f}")
    for run in rounds:
        if abs(run["prepare"]["tokens"] / run["tokenizer"]["tokens"] - 1) > 0.01:  # a few are cut to no label
            raise RuntimeError(f"the sides did not encode the same text: {run}")
    figures = {
        "throughput_over_tokenizer": round(statistics.median(ratios), 3),
        "memory_growth_10x": round(growth, 3),
        "fill_rate": rounds[-1]["prepare"]["fill_rate"],
        "cached_seconds": round(statistics.median(cached), 2),
        "long_over_short": round(long_over_short, 2),
    }
    print(json.dumps(figures))


def print_run(side: str, run: dict[str, float]) -> None:
    speed = run["tokens"] / run["seconds"]
    print(f"{side:20}{run['seconds']:9.2f}{speed:12,.0f}{run['peak'] / 1e6:9.0f}", flush=True)


if __name__ == "__main__":
    main()
