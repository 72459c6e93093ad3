"""The parts of `python -m benchmarks.gpu`. Each prints a line and returns its figures by name."""

import statistics
from argparse import Namespace
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from benchmarks.generate.measure import BATCH, NEW_TOKENS, measure
from benchmarks.gpu.flops import matmul_flops_per_second, training_flops
from benchmarks.shared.processor import device_name
from benchmarks.step.ours import recipe_of
from benchmarks.step.setting import WARM_UP, Setting, run_side, write_rows
from tests.support.adapted_layer import Cell
from tests.support.random_llama import LLAMA_8B, build_model
from tests.support.timing import median_seconds
from tests.support.tiny_tokenizer import tiny_tokenizer
from trainer.estimate.estimate import Estimator
from trainer.estimate.resident import LIBRARIES
from trainer.recipe import BaseModelConfig
from trainer.run.gpu import compute_device

TINY = {
    "hidden_size": 64,
    "intermediate_size": 192,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 512,
}
SIZES: dict[str, dict[str, Any]] = {"8b": LLAMA_8B, "tiny": TINY}
Figures = dict[str, float]
GIB = 2**30


@dataclass(frozen=True)
class Bench:
    """What all parts share. folder: where the base lies, as `base`, and its rows, as `rows`."""

    folder: Path
    sizes: Mapping[str, Any]
    setting: Setting
    repetitions: int
    peak_tflops: float | None
    device: torch.device

    @property
    def base(self) -> str:
        return str(self.folder / "base")

    def run(self, side: str) -> tuple[float, dict[str, Any]]:
        """(tokens per second, all that a trainer on one rank has measured); the peaks are those of its process."""
        found = run_side(side, self.base, self.folder / "rows", self.setting, world=1)
        return statistics.median(self.setting.tokens_per_second(found)), found


def run_parts(folder: Path, options: Namespace) -> dict[str, Any]:
    """The figures of all parts that are asked for. Training comes first, while this process holds no GPU memory."""
    sizes = SIZES[options.size] | ({"num_hidden_layers": options.layers} if options.layers else {})
    setting = Setting(
        total_rank=options.total_rank,
        seq_len=options.seq_len,
        micro_batch_size=options.micro_batch_size,
        steps=WARM_UP + options.steps,
        sharded=False,
        checkpointing=True,
    )
    bench = Bench(folder, sizes, setting, options.repetitions, options.peak_tflops, compute_device())
    size = build_model(folder / "base", sizes)
    tiny_tokenizer().save_pretrained(folder / "base")
    write_rows(bench.base, 1.0, setting.seq_len, folder / "rows")
    print(f"base            {size / 1e9:.2f} GB in bf16, {sizes['num_hidden_layers']} layers; {device_name()}")
    parts = {"training": training, "trl": trl, "layer": layer, "decoding": decoding}
    found: dict[str, Any] = {}
    for name, part in parts.items():
        if name in options.parts:
            found |= part(bench)
    if {"training", "trl"} <= set(options.parts) and "trl_tokens_per_second" in found:
        found["step_over_trl"] = found["tokens_per_second"] / found["trl_tokens_per_second"]
    rounded = {name: round(value, 4) for name, value in found.items()}
    return {**rounded, "device": device_name(), "layers": sizes["num_hidden_layers"], "torch": torch.__version__}


def training(bench: Bench) -> Figures:
    """A step of ours. On a CPU the peak is all that the process holds, so it is no measure of the estimate."""
    speed, found = bench.run("ours")
    recipe = recipe_of(bench.base, bench.setting, world=1)
    estimator = Estimator(recipe)
    estimate = estimator.estimate(recipe, world_size=1)
    expected = estimate.device - LIBRARIES[estimator.kind]  # which torch's allocator does not see
    config = AutoConfig.from_pretrained(bench.base)  # nosec B615 # a local folder
    flops = training_flops(config, estimate.trained, bench.setting.seq_len)
    limit = 1e12 * bench.peak_tflops if bench.peak_tflops else matmul_flops_per_second(bench.sizes, bench.device)
    peak = found["peak_memory_bytes"]
    reserved = found.get("peak_reserved_bytes", peak)
    print(
        f"training        {speed:.0f} tokens per second, loaded in {found['load_seconds']:.1f} s, MFU "
        f"{speed * flops / limit:.1%} of {limit / 1e12:.2f} TFLOP/s"
    )
    print(
        f"                peak {peak / GIB:.2f} GiB, estimate {expected / GIB:.2f}, reserved {reserved / GIB:.2f}",
        flush=True,
    )
    return {
        "tokens_per_second": speed,
        "mfu": speed * flops / limit,
        "peak_tflops": limit / 1e12,
        "peak_over_estimate": peak / expected,
        "reserved_over_peak": reserved / peak,
        "load_seconds": found["load_seconds"],
    }


def trl(bench: Bench) -> Figures:
    """A step of TRL's; nothing where it is not installed."""
    if find_spec("trl") is None:
        print("trl             not installed: pip install 'trl==1.16.*'", flush=True)
        return {}
    speed, found = bench.run("trl")
    peak = found["peak_memory_bytes"]
    print(f"trl             {speed:.0f} tokens per second, loaded in {found['load_seconds']:.1f} s")
    print(f"                peak {peak / GIB:.2f} GiB", flush=True)
    return {
        "trl_tokens_per_second": speed,
        "trl_peak_gib": peak / GIB,
        "trl_load_seconds": found["load_seconds"],
    }


def layer(bench: Bench) -> Figures:
    """The widest linear of the base, in bf16, for the tokens of a micro-batch."""
    d_in, d_out = bench.sizes["hidden_size"], bench.sizes["intermediate_size"]
    tokens = bench.setting.micro_batch_size * bench.setting.seq_len
    adapted = Cell(d_in, d_out, bench.setting.total_rank, "bf16").build(tokens, bench.device)
    ours, theirs = (
        median_seconds(lambda name=name: adapted.step(name), bench.device, bench.repetitions)
        for name in ("teamlora", "lora")
    )
    print(
        f"layer           {d_in} -> {d_out}, {tokens} tokens: {1e3 * ours:.3f} ms, LoRA {1e3 * theirs:.3f} ms",
        flush=True,
    )
    return {"layer_over_lora": ours / theirs}


def decoding(bench: Bench) -> Figures:
    """Batches of generation on the NF4 base."""
    times = measure(BaseModelConfig(model=bench.base, quantization="nf4"), bench.repetitions)
    ours, plain = (BATCH * NEW_TOKENS / statistics.median(seconds) for seconds in times)
    print(f"decoding        {ours:.1f} tokens per second, plain {plain:.1f}; batch {BATCH}", flush=True)
    return {"decoded_tokens_per_second": ours, "decoding_over_plain": ours / plain}
