"""Two nodes of two ranks: plain ZeRO-3 against copies of base and adapter in each node, over links of three speeds.

    python -m benchmarks.nodes [BASE] [--full]

Nodes are network namespaces joined by a link whose speed tc limits (needs root and the Debian package iproute2). A step
is four micro-batches of one row of 64 tokens on each rank, on the sample base in NF4. All settings run in the same
processes and take turns. Bytes are those that the link's counters add to each node's outgoing traffic.
For weak scaling both nodes train at the same time, each for itself: they share this machine's cores, caches and memory,
whether they are joined or not. Every rank is held to half a core. Losses of a step are compared, too: the settings
change none. The base is small, so the new settings keep it whole on each rank, and the adapter in each node.
"""

import argparse
import json
import statistics
import tempfile
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from benchmarks.nodes.setting import SETTINGS, Measurement, Plan, recipe_of
from benchmarks.shared.cpu_groups import cpu_groups
from benchmarks.shared.processor import processor
from benchmarks.shared.two_nodes import ADDRESS, nodes, why_not, within
from benchmarks.step.setting import DEFAULT_BASE, write_rows
from tests.support.ranks import run_ranks
from trainer.estimate.estimate import Estimator

CORES = 0.5  # of each rank
SLOW, FAST = "200mbit", "1gbit"
OURS, PLAIN = "base and adapter", "zero3"
GLOO = 2  # its reduce-scatter sends as much as an all-reduce
MEGABYTE = 10**6


def run(plan: Plan, output: Path) -> list[Measurement]:
    """Every step that every rank has measured."""
    given = json.dumps(vars(plan))
    with nodes(plan.nodes) as names, cpu_groups(plan.world, CORES) as held:
        places = [[*held[rank], *within(names, rank, plan.ranks_per_node)] for rank in range(plan.world)]
        master = ADDRESS if plan.nodes > 1 else "127.0.0.1"
        run_ranks(plan.world, ["-m", "benchmarks.nodes.rank", given, str(output)], within=places, master=master)
    return [Measurement(**each) for of_rank in json.loads(output.read_text()) for each in of_rank]


def each_for_itself(plan: Plan, folder: Path) -> list[float]:
    """Tokens a second in each step of two nodes that know nothing of each other, sorted."""
    with ThreadPoolExecutor(2) as threads:
        found = list(threads.map(lambda name: run(plan, folder / name), ("first.json", "second.json")))
    steps = [[each.tokens / each.seconds for each in of_node if each.rank == 0] for of_node in found]
    return sorted(first + second for first, second in zip(*steps, strict=True))


def schedule(fast: int, slow: int) -> list[tuple[str, str | None]]:
    """Each setting once where only bytes matter, then so many steps of two settings on each of the slower links."""
    turns = [
        (name, rate) for rate, count in ((FAST, fast), (SLOW, slow)) for _ in range(count) for name in (PLAIN, OURS)
    ]
    return [*((name, None) for name in SETTINGS), *turns]


def of(found: list[Measurement], setting: str, rate: str | None = None) -> list[Measurement]:
    return [each for each in found if (each.setting, each.rate) == (setting, rate)]


def speeds(found: list[Measurement]) -> list[float]:
    """Tokens a second of all ranks, in each step."""
    return sorted(each.tokens / each.seconds for each in found)


def sent(found: list[Measurement]) -> float:
    """Bytes out of a node in a step."""
    return statistics.median(each.sent for each in found)


def estimated(plan: Plan, setting: str) -> dict[str, int]:
    """Bytes out of a node in a step by cause."""
    recipe = recipe_of(plan, setting)
    found = Estimator(recipe, "cpu", plan.ranks_per_node).estimate(recipe, plan.world).between_nodes
    if SETTINGS[setting].get("adapter") is None:
        found["gradients"] *= GLOO
    return found


def causes(plan: Plan, found: list[Measurement]) -> dict[str, tuple[float, float]]:
    """{cause: (bytes counted, bytes estimated)}: what a setting keeps within the node is the difference to the last."""
    plain, base, both = (sent(of(found, name)) for name in SETTINGS)
    expected = {name: estimated(plan, name) for name in SETTINGS}
    rest = expected["base"]
    return {
        "gathers of the base": (plain - base, expected[PLAIN]["gathers of the base"]),
        "gathers and gradients of the adapter": (base, rest["gathers of the adapter"] + rest["gradients"]),
        "gradients between copies": (both, expected[OURS]["gradients"]),
    }


def report(plan: Plan, two: list[Measurement], alone: list[float]) -> dict[str, float]:
    """Prints the tables. alone: tokens a second of both nodes together, each for itself."""
    print("setting           link        MB out of a node   tokens/s  of each step")
    for name in SETTINGS:
        for rate in (None, FAST, SLOW):
            if not (found := of(two, name, rate)):
                continue
            speed = speeds(found)
            print(
                f"{name:17} {rate or 'unlimited':11} {sent(found) / MEGABYTE:16.1f} {statistics.median(speed):10.1f}  "
                f"{speed[0]:.1f} to {speed[-1]:.1f}"
            )
    print(
        f"each for itself   -           {0:16.1f} {statistics.median(alone):10.1f}  {alone[0]:.1f} to {alone[-1]:.1f}"
    )
    print("\ncause                                  counted MB  estimated MB")
    ratios = {}
    for cause, (counted, expected) in causes(plan, two).items():
        print(f"{cause:38} {counted / MEGABYTE:10.1f} {expected / MEGABYTE:13.1f}")
        ratios[cause] = counted / expected
    median = {(n, rate): statistics.median(speeds(of(two, n, rate))) for n in (OURS, PLAIN) for rate in (FAST, SLOW)}
    return {
        "cross_node_bytes_over_zero3": sent(of(two, OURS)) / sent(of(two, PLAIN)),
        "speed_over_zero3_slow_link": median[OURS, SLOW] / median[PLAIN, SLOW],
        "speed_over_zero3_fast_link": median[OURS, FAST] / median[PLAIN, FAST],
        "weak_scaling": median[OURS, FAST] / statistics.median(alone),
        "bytes_over_estimate": max(ratios.values(), key=lambda ratio: abs(ratio - 1)),
        "largest_difference_of_losses": largest_difference(two),
    }


def largest_difference(found: list[Measurement]) -> float:
    """Relative, between the settings' losses of the same step."""
    ours, plain = ([each.loss for each in found if each.setting == name] for name in (OURS, PLAIN))
    return max(abs(a - b) / b for a, b in zip(ours, plain, strict=True))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--full", action="store_true", help="5 steps of each on a slow link instead of 1 or 2")
    options = parser.parse_args(arguments)
    if (reason := why_not()) is not None:
        print(f"skipped: {reason}")
        return
    with tempfile.TemporaryDirectory() as folder:
        rows = Path(folder) / "rows"
        plan = Plan(options.base, str(rows), 2, schedule(*((5, 5) if options.full else (2, 1))))
        write_rows(options.base, 1.0, plan.seq_len, rows)
        two = run(plan, Path(folder) / "two.json")
        alone = Plan(options.base, str(rows), 1, [(OURS, None)] * (5 if options.full else 3))
        figures = report(plan, two, each_for_itself(alone, Path(folder)))
    print()
    print(json.dumps({**{name: round(value, 4) for name, value in figures.items()}, "processor": processor()}))


if __name__ == "__main__":
    main()
