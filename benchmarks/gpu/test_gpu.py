"""The GPU benchmark without a GPU: it ends at once, and every part runs on a tiny base on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.gpu.flops import attention_flops, training_flops, weight_flops
from benchmarks.gpu.parts import TINY
from tests.support.random_llama import LLAMA_8B
from tests.support.timing import children_seconds

REPOSITORY = Path(__file__).parent.parent.parent
TRY = "--device cpu --size tiny --layers 1 --seq-len 64 --micro-batch-size 1 --steps 2 --repetitions 2 --total-rank 8"


def run_benchmark(*arguments: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "benchmarks.gpu", *arguments]
    return subprocess.run(command, cwd=REPOSITORY, capture_output=True, text=True)


@pytest.mark.skipif(any(Path("/dev").glob("nvidia[0-9]*")), reason="this machine has a GPU")
def test_without_a_gpu_it_ends_at_once_with_what_it_needs():
    before = children_seconds()
    done = run_benchmark()
    assert children_seconds() - before < 1
    assert done.returncode == 0
    assert done.stdout.startswith("gpu: nothing was measured. This benchmark needs an NVIDIA GPU (/dev/nvidia0), its")
    assert done.stdout.count("\n") == 1 and done.stderr == ""


@pytest.mark.slow
def test_all_parts_but_trls_run_on_a_cpu_and_their_figures_are_the_last_line():
    done = run_benchmark(*TRY.split(), "--peak-tflops", "0.5", "--parts", "training", "layer", "decoding")
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    positive = {
        "tokens_per_second",
        "mfu",
        "peak_over_estimate",
        "load_seconds",
        "layer_over_lora",
        "decoded_tokens_per_second",
        "decoding_over_plain",
    }
    assert all(found[name] > 0 for name in positive)
    assert (found["device"], found["layers"], found["peak_tflops"]) == ("cpu", 1, 0.5)
    config = LlamaConfig(**{**TINY, "num_hidden_layers": 1})
    trained = 3 * 8 * (64 + 192) + 3 * 4 * 4 + 4 * (64 + 64 + 192)  # A and B, M and the routers of three linears
    expected = found["tokens_per_second"] * training_flops(config, trained, 64) / 0.5e12
    assert found["mfu"] == pytest.approx(expected, abs=1e-4)


def test_operations_are_those_that_torch_counts():
    """Forward; eager attention computes all pairs of tokens, twice what causal attention needs."""
    config = LlamaConfig(**TINY, attn_implementation="eager")
    with FlopCounterMode(display=False) as counted:
        LlamaForCausalLM(config)(torch.zeros(3, 32, dtype=torch.long), use_cache=False)
    assert counted.get_total_flops() == 3 * 32 * (weight_flops(config) + 2 * attention_flops(config, 32))


def test_an_8b_model_takes_four_operations_per_weight_and_token():
    """Llama 3's 8.03 billion weights, less the embedding."""
    config = LlamaConfig(**LLAMA_8B)
    assert training_flops(config, 0, 2048) == pytest.approx(
        4 * (8.03e9 - 4096 * 128256) + 6 * 2048 * 4096 * 32, rel=1e-3
    )
