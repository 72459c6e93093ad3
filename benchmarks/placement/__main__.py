"""Expert placement against plain ZeRO-3: bytes sent, time, memory, and where `auto` switches.

    python -m benchmarks.placement [--full]

Bytes are read from the interface counters of private network namespaces (needs root and the Debian package iproute2),
with ranks in nodes of two: what a node's ranks say to each other passes its loopback, the rest the link between
nodes. There A, router and M are a hundredth of B. Times are of 2 ranks on a resident base (trained weights are all
that ZeRO-3 has); "adapter time" is a step less the bare base's step. ZeRO-3 has persistence threshold 0 and no reuse
from forward to backward, as any model past its default reuse distance of 10^9 parameters has none: it would keep
this small one whole.
"""

import argparse
import json
import shutil
import statistics
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.placement.rank import EXPERT_RANK, FOR_BYTES, NUM_EXPERTS
from benchmarks.shared.two_nodes import ADDRESS, nodes, within
from tests.support.ranks import run_ranks

GRID = [8, 64, 512, 1024]
FULL_GRID = [8, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096]
ELEMENT = 2  # bytes, bf16
BYTES_TOKENS = 256  # a rank, in the runs that count bytes
TOTAL_RANK = NUM_EXPERTS * EXPERT_RANK
WIDTHS = [FOR_BYTES.feed_forward] * len(FOR_BYTES.targets) * FOR_BYTES.layers  # d_out of the adapted linears
ELEMENTS = TOTAL_RANK * sum(WIDTHS)  # of all B
STATE = ELEMENTS * (ELEMENT + 4 * 4)  # B in bf16; gradient, master copy and two moments in fp32


def count_bytes(world: int, sizes: list[int], output: Path) -> list[dict[str, Any]]:
    """What every rank saw: bytes sent by its node and interface, and expert state, of each variant."""
    given = json.dumps({"tokens": BYTES_TOKENS, "sizes": sizes})
    with nodes(max(1, world // 2)) as names:
        places = [within(names, rank, ranks_per_node=2) for rank in range(world)]
        master = ADDRESS if world > 2 else "127.0.0.1"
        arguments = ["-m", "benchmarks.placement.rank", "bytes_and_state", given, str(output)]
        run_ranks(world, arguments, within=places, master=master)
    return json.loads(output.read_text())


def model_bytes(variant: str, kind: str) -> float:
    """Bytes a rank sends of B by teamlora.md's table; `zero3` is `weights` over all ranks."""
    dispatch, size = variant.split()[:2]
    n = int(size)
    if dispatch == "weights":
        return (n - 1) / n * ELEMENTS * ELEMENT * (3 if kind == "train" else 1)
    return (n - 1) * BYTES_TOKENS * sum(TOTAL_RANK + d for d in WIDTHS) * ELEMENT * (2 if kind == "train" else 1)


def sent(found: list[dict[str, Any]], variant: str, kind: str, interface: str | None = None) -> float:
    """Bytes a rank sends, over all interfaces or one; ranks 0 and 2 tell for their nodes."""
    world = len(found)
    total = 0.0
    for rank in range(0, world, 2):
        counts = found[rank][variant]["sent"][kind]
        total += sum(value for name, value in counts.items() if interface in (None, name))
    return total / world


def show_bytes(found: dict[int, list[dict[str, Any]]]) -> dict[str, float]:
    worst, across = 0.0, {}
    print("ranks  placement              step    MB sent a rank  of the table  across nodes")
    for world, ranks in found.items():
        for variant in ranks[0]:
            for kind in ("train", "eval"):
                total, link = sent(ranks, variant, kind), sent(ranks, variant, kind, "link0")
                table = ""
                # the table has neither partitioning over replicas nor the sum over them
                if variant != "zero3" and int(variant.split()[1]) == world:
                    ratio = total / model_bytes(variant, kind)
                    worst, table = max(worst, ratio), f"{ratio:.3f}"
                print(f"{world:5}  {variant:20} {kind:>6} {total / 1e6:17.2f} {table:>13} {link / 1e6:13.2f}")
                across[world, variant, kind] = link
    name = "weights 2 replicate"
    return {
        "bytes_over_model": round(worst, 3),
        "cross_node_bytes_over_zero3": round(across[4, name, "train"] / across[4, "zero3", "train"], 3),
    }


def show_state(found: dict[int, list[dict[str, Any]]]) -> dict[str, float]:
    worst = 0.0
    print("\nranks  placement              MB of B's state a rank  of what it should be")
    for world, ranks in found.items():
        for variant in ranks[0]:
            share = int(variant.split()[1]) if variant.endswith("replicate") else world
            held = max(rank[variant]["state"] for rank in ranks)
            ratio = held / (STATE / share)
            worst = max(worst, ratio)
            print(f"{world:5}  {variant:20} {held / 1e6:24.2f} {ratio:21.3f}")
    return {"expert_bytes_over_model": round(worst, 3)}


def show_times(found: dict[str, dict[str, dict[str, list[float]]]]) -> dict[str, float]:
    ratios, worst = {}, 0.0
    names = list(next(iter(found["train"].values())))
    print("\nmedian ms of a step   tokens  " + "  ".join(f"{name:>10}" for name in names))
    for kind, by_tokens in found.items():
        for tokens, runs in by_tokens.items():
            ms = {name: 1e3 * statistics.median(values) for name, values in runs.items()}
            print(f"{kind:20} {tokens:>7}  " + "  ".join(f"{ms[name]:10.1f}" for name in names))
            best, other = sorted((ms["weights"], ms["tokens"]))
            if other / best > 1.2:
                worst = max(worst, ms["auto"] / best)
            for name in ("weights", "tokens"):
                beyond = ms["zero3"] - ms["bare"]
                ratios[kind, int(tokens), name] = (ms[name] - ms["bare"]) / beyond, ms[name] / ms["zero3"]
    print("\nadapter time over plain ZeRO-3 sharding (and whole step)")
    for (kind, tokens, name), (adapter, whole) in ratios.items():
        print(f"{kind:6} {tokens:>5} {name:8} {adapter:6.2f} ({whole:.2f})")
    return {
        "auto_over_best": round(worst, 3),
        "weights_over_zero3": round(ratios["train", 1024, "weights"][0], 3),
        "weights_step_over_zero3": round(ratios["train", 1024, "weights"][1], 3),
        "tokens_over_zero3_small": round(ratios["eval", 8, "tokens"][0], 3),
    }


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help=f"T from {FULL_GRID[0]} to {FULL_GRID[-1]}, more runs")
    options = parser.parse_args(arguments)
    if shutil.which("ip") is None:
        parser.error("counting bytes needs the command `ip`: install the Debian package iproute2, and run as root")
    numbers: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "found.json"
        counted = {world: count_bytes(world, sizes, output) for world, sizes in ((2, [2]), (4, [2, 4]))}
        numbers |= show_bytes(counted) | show_state(counted)
        given = {"grid": FULL_GRID if options.full else GRID, "repetitions": 9 if options.full else 7}
        said = run_ranks(2, ["-m", "benchmarks.placement.rank", "times", json.dumps(given), str(output)], limit=3600)
        numbers |= show_times(json.loads(output.read_text())[0])
        print("\n".join(line for line in said[0].splitlines() if line.startswith("auto:")))
    numbers["device"] = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
