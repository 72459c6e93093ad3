"""Tokens a second of our batched generation under an adapter, against plain `model.generate` on the bare base.

    python -m benchmarks.generate [BASE]

Both answer the same prompts with the same number of new tokens, greedily, on the same base in the same process, once
with decoder linears in NF4 and once in bf16. Ours is what `teamlora evaluate` does with a batch: padding, generation
with TeamLoRA (k = 4, r_B = 8, on all seven linears of a layer, experts drawn anew), decoding to text. Repetitions
interleave and give a ratio each; told are medians and quartiles. Time is CPU time of this process on a CPU, where
it has one thread, and the clock's on a GPU. The last line is one JSON object, whose
`tokens_over_plain` is the worse of the two bases.
"""

import argparse
import json
import statistics
from collections.abc import Sequence

import torch

from benchmarks.generate.measure import BATCH, NEW_TOKENS, measure
from benchmarks.shared.processor import device_name
from trainer.recipe import BaseModelConfig

DEFAULT_BASE = "bases/smollm2-135m-instruct"
BASES = {"nf4": "nf4", "bf16": "none"}  # name: base.quantization


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", nargs="?", default=DEFAULT_BASE, help="folder of a causal LM; default: the sample base")
    parser.add_argument("--repetitions", type=int, default=9, help="of each base (default: %(default)s)")
    options = parser.parse_args(arguments)
    torch.set_num_threads(1)
    print(f"batch {BATCH}, {NEW_TOKENS} new tokens, 1 thread; tokens a second, medians")
    print(f"{'base':6} {'ours':>8} {'plain':>8}   ours over plain: median (quartiles)")
    found = {}
    for name, quantization in BASES.items():
        ours, plain = measure(BaseModelConfig(model=options.base, quantization=quantization), options.repetitions)
        low, middle, high = statistics.quantiles([p / o for o, p in zip(ours, plain, strict=True)], n=4)
        speeds = (BATCH * NEW_TOKENS / statistics.median(times) for times in (ours, plain))
        print("{:6} {:8.1f} {:8.1f}".format(name, *speeds), f"  {middle:.3f} ({low:.3f} to {high:.3f})", flush=True)
        found[f"tokens_over_plain_{name}"] = round(middle, 3)
    print(json.dumps({"tokens_over_plain": min(found.values()), **found, "device": device_name(), "batch": BATCH}))


if __name__ == "__main__":
    main()
