"""On one GPU: what a training step of an 8B model takes, against TRL's and the estimate, and what decoding takes.

    python -m benchmarks.gpu [--layers N] [--parts training trl layer decoding]

Not run on a GPU yet. Makes a base of random weights (16 GB in bf16; TMPDIR says where) and measures in this order:

    training   tokens per second, MFU, peak memory over `teamlora estimate`, seconds to load; TeamLoRA, k = 4
    trl        the same rows with TRL's SFTTrainer and PEFT's LoRA of the same total rank, where TRL is installed
    layer      forward and backward of one adapted linear over those of the leanest LoRA of the same total rank
    decoding   tokens per second of batched generation under TeamLoRA over plain `generate` on the bare base

Both trainers have NF4 weights, activation checkpointing and rows of one document. The last line is one JSON object.
Without a GPU nothing is measured; `--device cpu --size tiny` tries every part there.
"""

import argparse
import json
import os
import tempfile
from collections.abc import Sequence
from pathlib import Path

from data_prep.user_error import UserError
from trainer.console.library_logs import silence_libraries
from trainer.run.gpu import configure_allocator, gpu_files

PARTS = ("training", "trl", "layer", "decoding")
NEEDS = (
    "gpu: nothing was measured. This benchmark needs an NVIDIA GPU (/dev/nvidia0), its driver and a CUDA build of "
    "torch; see docs/gpu.md"
)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=PARTS, help="default: all")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="default: %(default)s")
    parser.add_argument("--size", choices=("8b", "tiny"), default="8b", help="of the base (default: %(default)s)")
    parser.add_argument("--layers", type=int, help="decoder layers of the base, where memory is short")
    parser.add_argument("--seq-len", type=int, default=2048, help="tokens per row (default: %(default)s)")
    parser.add_argument("--micro-batch-size", type=int, default=2, help="rows per step (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="that count, of each trainer (default: %(default)s)")
    parser.add_argument("--total-rank", type=int, default=64, help="of both adapters (default: %(default)s)")
    parser.add_argument("--repetitions", type=int, default=9, help="of layer and decoding (default: %(default)s)")
    parser.add_argument("--peak-tflops", type=float, help="what MFU is a share of; default: a large product, measured")
    options = parser.parse_args(arguments)
    if options.device == "cpu":
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
    elif not gpu_files() and not Path("/dev/dxg").exists():
        print(NEEDS)
        return
    silence_libraries()
    configure_allocator()
    from benchmarks.gpu.parts import run_parts  # imports torch, which takes seconds

    with tempfile.TemporaryDirectory() as folder:
        try:
            found = run_parts(Path(folder), options)
        except UserError as error:
            parser.exit(2, f"error: {error}\n")
    print(json.dumps(found))


if __name__ == "__main__":
    main()
