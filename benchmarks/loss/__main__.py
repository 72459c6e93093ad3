"""The loss with logits a chunk at a time against whole logits: memory, time of loss and head, and whether they agree.

    python -m benchmarks.loss [--pairs N] [--dtype bf16|fp32] [--chunk N]

Peaks are RssAnon above what model and hidden states take, each in a process of its own, in both dtypes and with narrow
hidden states, which leaves the logits as large. Times are CPU time of this process on one thread, of whole and chunked
by turns; each pair gives a ratio, and the table has their median and quartiles. The last line is one JSON object.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import time

import torch

from benchmarks.loss.head import DTYPES, HIDDEN, NARROW, TOKENS, VOCABULARY, Head
from benchmarks.shared.processor import processor
from trainer.objective.chunked_logits import default_chunk
from trainer.training.run_plan import cpu_has_fast_bf16

WHOLE = 0


def peak(dtype: str, chunk: int) -> int:
    """Bytes, with a malloc that returns what is freed."""
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "2"}
    command = [sys.executable, "-m", "benchmarks.loss.head", dtype, str(chunk)]
    return int(subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True).stdout)


def times(head: Head, chunk: int, pairs: int) -> dict[int, list[float]]:
    """Seconds of whole and chunked steps, which take turns at being first."""
    seconds: dict[int, list[float]] = {WHOLE: [], chunk: []}
    head.step(chunk)
    for pair in range(pairs):
        for each in (WHOLE, chunk) if pair % 2 == 0 else (chunk, WHOLE):
            started = time.process_time()
            head.step(each)
            seconds[each].append(time.process_time() - started)
    return seconds


def disagreement(chunk: int) -> tuple[float, float]:
    """Of losses and gradients in fp32, relative."""
    head = Head("fp32", NARROW)
    (loss, gradient), (expected, exact) = (head.step(each) for each in (chunk, WHOLE))
    return abs(loss / expected - 1), float((gradient - exact).norm() / exact.norm())


def main() -> None:
    parser = argparse.ArgumentParser(description="The loss in chunks of logits against whole logits.")
    parser.add_argument("--pairs", type=int, default=6, help="of timed steps (default: %(default)s)")
    parser.add_argument("--dtype", choices=DTYPES, help="that is timed (default: bf16 where the CPU is fast at it)")
    parser.add_argument("--chunk", type=int, default=default_chunk(VOCABULARY), help="tokens (default: %(default)s)")
    options = parser.parse_args()
    chunk, dtype = options.chunk, options.dtype or ("bf16" if cpu_has_fast_bf16() else "fp32")
    torch.set_num_threads(1)
    print(f"{TOKENS} labelled tokens, {VOCABULARY:,} words, hidden {HIDDEN}, chunks of {chunk}; {processor()}\n")
    row = "{:<16} {:>12} {:>12} {:>22}"
    print(row.format("", "whole", "chunked", "over whole"))
    found: dict[str, float] = {}
    for each in DTYPES:
        whole, chunked = peak(each, WHOLE), peak(each, chunk)
        found[f"peak_over_whole_{each}"] = chunked / whole
        ratio = f"{chunked / whole:.3f}"
        print(row.format(f"peak, {each}", f"{whole / 2**20:.0f} MiB", f"{chunked / 2**20:.0f} MiB", ratio), flush=True)
    loss_error, gradient_error = disagreement(chunk)
    seconds = times(Head(dtype), chunk, options.pairs)
    ratios = [ours / theirs for ours, theirs in zip(seconds[chunk], seconds[WHOLE], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    whole_time, chunked_time = (f"{statistics.median(seconds[each]):.1f} s" for each in (WHOLE, chunk))
    print(row.format(f"time, {dtype}", whole_time, chunked_time, f"{middle:.3f} ({low:.3f}-{high:.3f})"))
    print(f"\nchunked differs from whole in fp32 by {loss_error:.1e} (loss), {gradient_error:.1e} (gradient), relative")
    figures = {
        "peak_over_whole": max(found.values()),
        **found,
        "time_over_whole": middle,
        "time_quartiles": [round(low, 4), round(high, 4)],
        "loss_error": loss_error,
        "gradient_error": gradient_error,
    }
    rounded = {name: round(value, 4) if "over" in name else value for name, value in figures.items()}
    print(json.dumps({**rounded, "chunk": chunk, "dtype": dtype, "processor": processor(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
