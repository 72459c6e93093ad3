"""One rank of `python -m benchmarks.load`: loads the base one way while another process watches its memory."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from peft import LoraConfig, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM

from benchmarks.shared.process_memory import PeakWatch, anonymous_bytes
from benchmarks.shared.usual_quantization import usual_quantization
from trainer.base.loader import load_opened
from trainer.base.nf4 import NF4Linear
from trainer.base.weight_map import open_base
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.recipe import BaseModelConfig

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "bf16": {"enabled": True},
    "zero_allow_untested_optimizer": True,
    # small buckets: what is measured is the base, not DeepSpeed's buffers for gradients
    "zero_optimization": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "reduce_bucket_size": 1_000_000,
        "stage3_prefetch_bucket_size": 1_000_000,
    },
}


def usual(folder: str, _device: torch.device) -> nn.Module:
    """from_pretrained with bitsandbytes: the whole quantised model on every rank, sharded by initialize."""
    quantization = usual_quantization()
    return AutoModelForCausalLM.from_pretrained(  # nosec B615 # a local folder
        folder, quantization_config=quantization, dtype=torch.bfloat16
    )


def ours(folder: str, device: torch.device) -> nn.Module:
    opened = open_base(BaseModelConfig(model=folder))
    model = load_opened(opened, Zero3Sharding(CONFIG, device, dist.get_world_size()))
    model.bytes_read = opened.weights.bytes_read
    return model


def initialize(model: nn.Module) -> None:
    """A small adapter, since DeepSpeed wants something to train, and the engine."""
    import deepspeed

    adapted = get_peft_model(model, LoraConfig(r=4, target_modules=["q_proj"]))
    trainable = [p for p in adapted.parameters() if p.requires_grad]
    deepspeed.initialize(model=adapted, optimizer=torch.optim.AdamW(trainable), config=CONFIG)


def resident_bytes(model: nn.Module) -> dict[str, int]:
    """Bytes of the base that stay on this rank: shards, and what is whole on every rank, by kind."""
    found = {"shards": 0, "whole": 0}
    for name, parameter in model.named_parameters():
        if "lora" not in name:
            held = getattr(parameter, "ds_tensor", parameter)
            found["shards"] += held.numel() * held.element_size()
            state = getattr(parameter, "quant_state", None)  # of bitsandbytes: absmax, on every rank
            if state is not None:
                found["whole"] += state.absmax.nbytes + (state.state2.absmax.nbytes if state.state2 else 0)
    for module in model.modules():
        if isinstance(module, NF4Linear):
            found["whole"] += module.second.absmax.nbytes
    return found


def measure(way: str, folder: str, device: torch.device) -> dict[str, Any]:
    dist.barrier()
    watch = PeakWatch()
    before = anonymous_bytes()
    started = time.perf_counter()
    model = {"usual": usual, "ours": ours}[way](folder, device)
    initialize(model)
    seconds = time.perf_counter() - started
    peak = watch.peak()
    return {
        "seconds": seconds,
        "peak": peak - before,
        "after": anonymous_bytes() - before,
        "resident": resident_bytes(model),
        "read": getattr(model, "bytes_read", None),
    }


if __name__ == "__main__":
    silence_libraries()
    with process_group() as device:
        found = measure(sys.argv[1], sys.argv[2], device)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if dist.get_rank() == 0:
            Path(sys.argv[3]).write_text(json.dumps(everyone))
        dist.barrier()
