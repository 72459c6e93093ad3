"""What TeamLoRA costs on one adapted linear: forward and backward, against a LoRA of the same total rank r_A and
against the MoELoRA loop over experts as it is published.

    python -m benchmarks.layer

Each repetition runs the three variants once, in random order, and gives two ratios; told are their medians and
quartiles, which what else the machine does moves little. Time is CPU time of this process, on one thread. The last
line is one JSON object with the worst cell of each column.
"""

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from tests.support.adapted_layer import DTYPES, Cell, K

TOKENS = 1024
SHAPES = ((1024, 2816), (576, 1536))  # d_in, d_out: the gate projections of a 0.6B and a 135M model
TOTAL_RANKS = (32, 128)
FEWEST_REPETITIONS = 15


@dataclass(frozen=True)
class Result:
    """Ratios of CPU time, one a repetition, and bytes kept for backward, parameters aside."""

    over_lora: list[float]
    over_loop: list[float]
    saved: int
    saved_by_lora: int


def measure(cell: Cell, seconds: float) -> Result:
    """Run one cell for about so many seconds."""
    layer = cell.build(TOKENS)
    times: dict[str, list[float]] = {name: [] for name in layer.variants}
    order, shuffled = list(layer.variants), random.Random(0)
    for name in order:
        layer.step(name)
    end = time.monotonic() + seconds
    while time.monotonic() < end or len(times["lora"]) < FEWEST_REPETITIONS:
        shuffled.shuffle(order)
        for name in order:
            started = time.process_time()
            layer.step(name)
            times[name].append(time.process_time() - started)
    saved = {
        name: saved_bytes(partial(layer.forward, name), [layer.weight, *module.parameters()])
        for name, module in layer.variants.items()
    }
    over_lora, over_loop = (
        [ours / theirs for ours, theirs in zip(times["teamlora"], times[other], strict=True)]
        for other in ("lora", "loop")
    )
    return Result(over_lora, over_loop, saved["teamlora"], saved["lora"])


def saved_bytes(forward: Callable[[], Tensor], parameters: list[Tensor]) -> int:
    """Memory that a forward keeps for its backward, parameters aside; shared memory counts once."""
    owned, kept = {p.untyped_storage().data_ptr() for p in parameters}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(keep, lambda tensor: tensor):
        out = forward()  # alive till the sum is taken: what it keeps must not lend its address to another tensor
    total = sum(size for pointer, size in kept.items() if pointer not in owned)
    del out
    return total


def spread(ratios: list[float]) -> str:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return f"{middle:.3f} ({low:.3f}-{high:.3f})"


def main() -> None:
    parser = argparse.ArgumentParser(description="Cost of TeamLoRA on one linear layer, on one CPU thread.")
    parser.add_argument("--seconds", type=float, default=22.0, help="a cell; there are 8 (default: %(default)s)")
    seconds = parser.parse_args().seconds
    torch.set_num_threads(1)
    print(f"forward + backward, {TOKENS} tokens, k = {K}; ratios of CPU time: median (quartiles)\n")
    heads = ("d_in -> d_out", "r_A", "dtype", "over LoRA", "over MoELoRA loop", "saved bytes", "runs")
    row = "{:<14} {:>4} {:>6} {:>22} {:>22} {:>12} {:>6}"
    print(row.format(*heads))
    cells = [Cell(*shape, rank, dtype) for shape in SHAPES for rank in TOTAL_RANKS for dtype in DTYPES]
    results = []
    for cell in cells:
        result = measure(cell, seconds)
        results.append(result)
        columns = (f"{cell.d_in} -> {cell.d_out}", cell.total_rank, cell.dtype)
        ratios = (spread(result.over_lora), spread(result.over_loop), f"{result.saved / result.saved_by_lora:.4f}")
        print(row.format(*columns, *ratios, len(result.over_lora)), flush=True)
    excess = [
        (result.saved - result.saved_by_lora) / TOKENS / DTYPES[cell.dtype].itemsize
        for cell, result in zip(cells, results, strict=True)
    ]
    worst = {
        "teamlora_over_lora": round(max(statistics.median(result.over_lora) for result in results), 4),
        "teamlora_over_moelora_loop": round(max(statistics.median(result.over_loop) for result in results), 4),
        "saved_bytes_over_lora": round(max(result.saved / result.saved_by_lora for result in results), 4),
        "saved_bytes_excess_per_token_values": max(excess),
    }
    print("\nworst cell of each column")
    print(json.dumps({**worst, "threads": torch.get_num_threads(), "torch": torch.__version__}))


if __name__ == "__main__":
    main()
