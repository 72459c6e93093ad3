"""One rank of `python -m benchmarks.placement`: the same adapted model under every placement, stepped in turn.

The base is resident: its frozen weights are buffers, which ZeRO-3 leaves alone, so that what a step costs beyond
the step of the bare base is the adapter's. For bytes the base is narrow and its feed-forward wide, so that A, router
and M are a hundredth of B.
"""

import json
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_local_fp32_param, safe_get_local_grad, safe_get_local_optimizer_state
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

from trainer.adapters.adapter_config import TeamLoraConfig
from trainer.console.library_logs import silence_libraries
from trainer.distributed.adapter_groups import make_adapter_groups, tag_for_zero3
from trainer.distributed.autotune import autotune
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.process_group import process_group
from trainer.recipe import ExpertsConfig

VOCABULARY, NUM_EXPERTS, EXPERT_RANK = 256, 4, 32
DTYPE = torch.bfloat16


@dataclass(frozen=True)
class Shape:
    """A base, and what of it is adapted."""

    hidden: int
    feed_forward: int
    layers: int
    targets: tuple[str, ...]
    expert_rank: int = EXPERT_RANK


FOR_TIMES = Shape(576, 1536, 4, ("gate_proj", "up_proj", "down_proj"))
FOR_BYTES = Shape(64, 8192, 2, ("gate_proj", "up_proj"))


@dataclass(frozen=True)
class Variant:
    """How B is held. threshold: of ZeRO-3's persistence, in elements. None of experts: no placement."""

    threshold: int = 0
    experts: ExpertsConfig | None = None


def variants(size: int) -> dict[str, Variant]:
    placed = {
        dispatch: Variant(experts=ExpertsConfig(parallel_size=size, dispatch=dispatch))
        for dispatch in ("weights", "tokens", "auto")
    }
    return {"replicated": Variant(threshold=10**9), "zero3": Variant(), **placed}


class Trained(nn.Module):
    """What DeepSpeed is given: tokens [batch, seq] in, a number to go backward from out."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(input_ids=ids, use_cache=False).logits.float().square().mean()


def bare_base(shape: Shape) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        hidden_size=shape.hidden,
        intermediate_size=shape.feed_forward,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.hidden // 64,
        num_key_value_heads=max(1, shape.hidden // 192),
        vocab_size=VOCABULARY,
        max_position_embeddings=8192,
    )
    base = LlamaForCausalLM(config).to(DTYPE)
    for parameter in base.parameters():
        parameter.requires_grad_(False)
    return base


def adapted(shape: Shape) -> PeftModel:
    config = TeamLoraConfig(
        num_experts=NUM_EXPERTS,
        expert_rank=shape.expert_rank,
        alpha=16,
        target_modules=list(shape.targets),
        init_weights=False,
    )
    model = get_peft_model(bare_base(shape), config, autocast_adapter_dtype=False)
    for module in list(model.modules()):
        for name, parameter in list(module._parameters.items()):
            if parameter is not None and not parameter.requires_grad:
                delattr(module, name)
                module.register_buffer(name, parameter.detach(), persistent=False)
    return model


def engine_of(variant: Variant, shape: Shape) -> Any:
    import deepspeed

    model = adapted(shape)
    if variant.experts is not None:
        groups = make_adapter_groups(variant.experts, dist.get_world_size())
        placement = ExpertParallel(model, groups, variant.experts.dispatch)
        tag_for_zero3(groups, placement.by_expert, [])
    trainable = [p for p in model.parameters() if p.requires_grad]
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "zero_allow_untested_optimizer": True,
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": variant.threshold,
            "stage3_max_reuse_distance": 0,
            "stage3_max_live_parameters": 0,
        },
    }
    optimizer = torch.optim.AdamW(trainable, lr=1e-4)
    engine, *_ = deepspeed.initialize(model=Trained(model), optimizer=optimizer, config=config)
    if variant.experts is not None and variant.experts.dispatch == "auto":
        autotune(placement)
        if dist.get_rank() == 0:
            print("auto:", placement.describe(), flush=True)
    return engine


def train_step(engine: Any, ids: Tensor) -> None:
    engine.train()
    engine.backward(engine(ids))
    engine.step()


@torch.no_grad()
def evaluate(engine: Any, ids: Tensor) -> None:
    engine.eval()
    engine(ids)


def bare_step(base: nn.Module, ids: Tensor) -> None:
    """Forward and backward of the base alone, to its first layer's input, as an adapter there would need."""
    x = base.get_input_embeddings()(ids).requires_grad_()
    base(inputs_embeds=x, use_cache=False).logits.float().square().mean().backward()


@torch.no_grad()
def bare_forward(base: nn.Module, ids: Tensor) -> None:
    base(input_ids=ids, use_cache=False)


def seconds(action: Callable[..., None], *arguments: Any) -> float:
    """Wall time of one call, begun together."""
    dist.barrier()
    started = time.perf_counter()
    action(*arguments)
    dist.barrier()
    return time.perf_counter() - started


def times(grid: list[int], repetitions: int) -> dict[str, dict[str, dict[str, list[float]]]]:
    """Seconds by kind of step, tokens a rank and variant; every variant in turn within a repetition."""
    base = bare_base(FOR_TIMES)
    engines = {name: engine_of(variant, FOR_TIMES) for name, variant in variants(dist.get_world_size()).items()}
    found: dict[str, dict[str, dict[str, list[float]]]] = {"train": {}, "eval": {}}
    for tokens in grid:
        ids = torch.arange(tokens).remainder(VOCABULARY).view(max(1, tokens // 1024), -1)
        for kind, action, bare in (("train", train_step, bare_step), ("eval", evaluate, bare_forward)):
            runs: dict[str, list[float]] = {name: [] for name in ("bare", *engines)}
            many = repetitions * 3 if tokens < 1024 else repetitions if tokens == 1024 else -(-repetitions // 3)
            for repetition in range(many + 1):
                for name in runs:
                    taken = seconds(bare, base, ids) if name == "bare" else seconds(action, engines[name], ids)
                    if repetition:  # the first is a warm-up
                        runs[name].append(taken)
            found[kind][str(tokens)] = runs
    return found


def interface_bytes() -> dict[str, int]:
    """Bytes sent so far by interface of this process's network namespace."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()[2:]
    return {line.split(":")[0].strip(): int(line.split(":")[1].split()[8]) for line in lines}


def sent(engine: Any, ids: Tensor, steps: int) -> dict[str, dict[str, float]]:
    """Bytes by kind of step and interface that this rank's node sends in a step of all its ranks."""
    found = {}
    for kind, action in (("train", train_step), ("eval", evaluate)):
        action(engine, ids)
        dist.barrier()
        before = interface_bytes()
        dist.barrier()
        for _ in range(steps):
            action(engine, ids)
        dist.barrier()
        after = interface_bytes()
        dist.barrier()
        found[kind] = {name: (after[name] - before[name]) / steps for name in after}
    return found


def state_bytes(engine: Any) -> int:
    """Bytes on this rank of B in compute dtype, its gradient, fp32 master copy and two moments."""
    total = 0
    for name, parameter in engine.module.named_parameters():
        if name.endswith((".experts", ".experts.own")):
            state = [safe_get_local_optimizer_state(parameter, key) for key in ("exp_avg", "exp_avg_sq")]
            held = [parameter.ds_tensor, safe_get_local_fp32_param(parameter), safe_get_local_grad(parameter), *state]
            total += sum(tensor.numel() * tensor.element_size() for tensor in held)
    return total


def bytes_and_state(tokens: int, sizes: list[int]) -> dict[str, Any]:
    """What each variant sends, and what this rank holds of B."""
    ids = torch.arange(tokens).remainder(VOCABULARY).view(1, -1)
    found: dict[str, Any] = {}
    placed = {
        f"{dispatch} {size}{' replicate' * replicate}": Variant(
            experts=ExpertsConfig(parallel_size=size, dispatch=dispatch, replicate=replicate, across_nodes=True)
        )
        for size in sizes
        for dispatch in ("weights", "tokens")
        for replicate in (False, True)
        if not (replicate and size == dist.get_world_size())
    }
    for name, variant in {"zero3": Variant(), **placed}.items():
        engine = engine_of(variant, FOR_BYTES)
        found[name] = {"sent": sent(engine, ids, steps=3)}
        keep_gradients(engine, ids)
        found[name]["state"] = state_bytes(engine)
    return found


def keep_gradients(engine: Any, ids: Tensor) -> None:
    """Leaves the engine just before its optimizer step, where every part of the state exists."""
    engine.train()
    engine.backward(engine(ids))


def main(mode: str, argument: str, output: str) -> None:
    silence_libraries()
    with process_group():
        given = json.loads(argument)
        found = times(**given) if mode == "times" else bytes_and_state(**given)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if dist.get_rank() == 0:
            Path(output).write_text(json.dumps(everyone))
        dist.barrier()


if __name__ == "__main__":
    main(*sys.argv[1:])
