"""What runs on the fake GPU, each under a name. `python -m tests.gpu_correctness.cases FILE` runs all and writes how.

It is a process of its own: the fake device stays registered.
"""

import json
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from accelerate import init_empty_weights
from peft import PeftModel
from torch import Tensor
from torch._C._distributed_c10d import FakeProcessGroup
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from tests.support import fake_gpu, scene
from tests.support.tiny_models import SIZES
from trainer.adapters import fused
from trainer.adapters.attach import attach_on_meta
from trainer.adapters.layer import Experts, freeze_experts
from trainer.adapters.router_stats import RouterStats
from trainer.base import varlen_attention
from trainer.base.loader import pack_linears
from trainer.base.nf4 import NF4Linear
from trainer.distributed import expert_shard
from trainer.distributed.accumulation import GradientAccumulation
from trainer.distributed.adapter_groups import AdapterGroups, Division
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.parallelize import ParallelModel
from trainer.distributed.token_dispatcher import TokenDispatcher
from trainer.objective.batches import Batch, BatchPlan, collate, move
from trainer.objective.loss import LabelledLoss
from trainer.recipe import AdapterConfig
from trainer.training.trainer import Trainer

METHODS: dict[str, dict[str, Any]] = {
    "teamlora": {},
    "renormalized": {"renormalize": True},
    "moelora": {"method": "moelora"},
    "hydralora": {"method": "hydralora"},
    "lora": {"method": "lora"},
}
GPU = fake_gpu.register()
CASES: dict[str, Callable[[], None]] = {}
Case = Callable[[], None]


def case(name: str) -> Callable[[Case], Case]:
    def register(run: Case) -> Case:
        CASES[name] = run
        return run

    return register


def model_on_meta(method: str, attention: str) -> PeftModel:
    """A packed Llama in bf16 with an adapter."""
    varlen_attention.register()
    config = CONFIG_MAPPING["llama"](**SIZES | {"num_hidden_layers": 1})
    with init_empty_weights(include_buffers=False):
        base = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation=attention)
    pack_linears(base, torch.bfloat16)
    base.requires_grad_(False)
    settings = {"expert_rank": 3, "alpha": 6.0, "dropout": 0.1, **METHODS[method]}
    if method != "lora":
        settings["balance_loss_weight"] = 0.1
    return attach_on_meta(base, AdapterConfig.model_validate(settings), torch.bfloat16)


@contextmanager
def model_on_gpu(method: str, attention: str = "sdpa") -> Iterator[PeftModel]:
    """That model on the fake GPU; within, all tensors are fake."""
    model = model_on_meta(method, attention)
    with fake_gpu.fake_tensors():
        fake_gpu.move_to(GPU, model)
        yield model


def batch_on_gpu() -> Batch:
    return move(collate(scene.rows(2, seed=1)), GPU)


def train_micro_batch(model: PeftModel, stats: RouterStats, chunk: int = 0) -> None:
    """Forward, loss and backward as `Trainer.train_step` makes them; what it leaves must be on the GPU."""
    loss_module, batch = LabelledLoss(model, stats, len(scene.TASKS), chunk).train(), batch_on_gpu()
    syncs = fake_gpu.HostSyncs()
    stats.begin_step(tokens=24, measure=True)
    with syncs.counted(), syncs.none_may_be_added():
        stats.begin_micro_batch(batch["task_ids"])
        loss, by_task = loss_module(batch, 10, 1.0)
        loss.backward()
        stats.end_micro_batch()
    report = stats.end_step()
    left = [loss, by_task.loss, by_task.labelled_tokens]
    left += [p.grad for p in model.parameters() if p.requires_grad]
    check_on_gpu(*left)
    if report is not None:  # copied to the host as one tensor
        assert report.weights.device.type == report.weights_by_task.device.type == "cpu"


def check_on_gpu(*tensors: Tensor | None) -> None:
    assert tensors and all(tensor is not None and tensor.device == GPU for tensor in tensors), tensors


def train(method: str, checkpointing: bool = False, attention: str = "sdpa", chunk: int = 0) -> None:
    with model_on_gpu(method, attention) as model:
        if checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        train_micro_batch(model, RouterStats(model, len(scene.TASKS)), chunk)


@torch.no_grad()
def decode(method: str) -> None:
    """One token for each of two rows, where experts that do not learn any more compute."""
    with model_on_gpu(method) as model:
        freeze_experts(model.eval())
        assert all((m.frozen is None) == (method == "renormalized") for m in model.modules() if isinstance(m, Experts))
        check_on_gpu(model(input_ids=torch.ones(2, 1, dtype=torch.int64, device=GPU), use_cache=False).logits)


@case("decode-packed")
def decode_packed() -> None:
    """The same by the kernel that only a CUDA device takes, where it is chosen by the device's name."""
    with mock.patch.object(NF4Linear, "_decodes_on_gpu", lambda _self, _x: True):
        decode("teamlora")


for method in METHODS:
    CASES[f"train-{method}"] = lambda method=method: train(method)
    CASES[f"decode-{method}"] = lambda method=method: decode(method)
CASES["train-checkpointed"] = lambda: train("teamlora", checkpointing=True)
CASES["train-loss-chunks"] = lambda: train("teamlora", chunk=4)
CASES["train-varlen"] = lambda: train("teamlora", attention="varlen")


@case("nf4-linear")
def nf4_linear() -> None:
    layer = NF4Linear(64, 96, True, torch.bfloat16)
    with fake_gpu.fake_tensors():
        fake_gpu.move_to(GPU, layer)
        x = torch.ones(5, 64, dtype=torch.bfloat16, device=GPU, requires_grad=True)
        y = layer(x)
        y.sum().backward()
        check_on_gpu(y, x.grad, layer.dequantized(torch.float32))


@contextmanager
def ranks(world: int) -> Iterator[None]:
    """This process as rank 1 of `world`, whose collectives leave what is in their outputs."""
    dist.Backend.register_backend("pretended", _pretended_group, extended_api=True, devices=["cpu", fake_gpu.NAME])
    dist.init_process_group("pretended", rank=1, world_size=world, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def _pretended_group(common: Any, backend: Any) -> Any:
    return FakeProcessGroup._create_internal(common.group_rank, common.group_size, backend)


@contextmanager
def placed_model(dispatch: Any, method: str) -> Iterator[tuple[PeftModel, RouterStats, ExpertParallel]]:
    """That model, where this rank owns half of the experts, which two other ranks have as well."""
    flat = mock.patch.object(expert_shard, "local_shard", lambda own: own.detach().flatten())  # as ZeRO-3 stores it
    with ranks(4), flat, model_on_gpu(method) as model:
        parallel, _ = dist.new_subgroups(2)
        replicas, _ = dist.new_subgroups_by_enumeration([[0, 2], [1, 3]])
        stats = RouterStats(model, len(scene.TASKS))
        groups = AdapterGroups(parallel, parallel, Division(replicas), Division(dist.group.WORLD))
        yield model, stats, ExpertParallel(model, groups, dispatch)


def place(dispatch: Any, method: str) -> None:
    """A micro-batch; where tokens travel, all ranks have as many."""
    with placed_model(dispatch, method) as (model, stats, placed):
        if dispatch == "tokens":
            placed._choose = lambda tokens: TokenDispatcher(placed.groups.parallel, (tokens, tokens))
        train_micro_batch(model, stats)
        check_on_gpu(*(shard.learned.grad for layer in placed.layers for shard in layer.shards))


CASES["place-weights"] = lambda: place("weights", "teamlora")
CASES["place-weights-moelora"] = lambda: place("weights", "moelora")
CASES["place-tokens"] = lambda: place("tokens", "teamlora")


@case("choose-dispatch")
def choose_dispatch() -> None:
    """Ranks tell one another how many tokens they have without waiting for their GPUs."""
    with placed_model("auto", "teamlora") as (_, _, placed):
        placed.tokens_up_to = {True: 100, False: 100}
        syncs = fake_gpu.HostSyncs()
        with syncs.counted(), syncs.none_may_be_added():
            assert placed._choose(40) is not None


class Engine:
    """What the Trainer asks of DeepSpeed's engine, whose own code needs a real device."""

    def __init__(self, module: LabelledLoss, syncs: fake_gpu.HostSyncs) -> None:
        self.module, self.syncs = module, syncs
        self.micro_batches = 0

    def __call__(self, *args: Any) -> Any:
        self.micro_batches += 1
        with self.syncs.none_may_be_added():
            return self.module(*args)

    def backward(self, loss: Tensor) -> None:
        with self.syncs.none_may_be_added():
            loss.backward()

    def step(self) -> None:
        pass

    def get_lr(self) -> list[float]:
        return [0.1]

    def coalesce_grad_reduction(self) -> AbstractContextManager[None]:
        return nullcontext()

    def set_gradient_accumulation_boundary(self, is_boundary: bool) -> None:
        pass

    def zero_optimization(self) -> bool:
        return True

    def get_global_grad_norm(self) -> Tensor:
        return torch.nn.utils.get_total_norm([p.grad for p in self.module.parameters() if p.grad is not None])


@case("optimizer-step")
def optimizer_step() -> None:
    """An optimizer step of two micro-batches: the host waits for counts, the loss and the gradient's norm."""
    plan, recipe = BatchPlan(8, 1, 4), scene.recipe(Path("unused"))
    prepared = scene.prepared(scene.rows(16, seed=2), [])
    with ranks(plan.world_size), model_on_gpu("teamlora") as model:
        stats, syncs = RouterStats(model, len(scene.TASKS)), fake_gpu.HostSyncs()
        engine = Engine(LabelledLoss(model, stats, len(scene.TASKS)).train(), syncs)
        accumulation = GradientAccumulation(engine, plan.gradient_accumulation_steps)
        parallel = ParallelModel(model, stats, engine, None, accumulation, nullcontext())
        trainer = Trainer(recipe, parallel, prepared, plan, GPU, total_steps=2)
        with syncs.counted():
            report = trainer.train_step(trainer.next_input())
    assert engine.micro_batches == 2 and report.step == 1
    assert 1 <= len(syncs) <= 3, dict(syncs.places)


@case("fault-tensor-on-the-cpu")
def tensor_on_the_cpu() -> None:
    """A deliberate fault: this case must fail."""
    softmax = fused._softmax
    with mock.patch.object(fused, "_softmax", lambda logits: softmax(logits) + torch.zeros(logits.shape)):
        train("teamlora")


@case("fault-tensor-on-the-cpu-in-backward")
def tensor_on_the_cpu_in_backward() -> None:
    """A deliberate fault: this case must fail."""
    backward = fused._softmax_backward
    with mock.patch.object(fused, "_softmax_backward", lambda g, phi: backward(g, phi) * torch.ones(phi.shape)):
        train("teamlora")


@case("fault-waits-in-backward")
def waits_in_backward() -> None:
    """A deliberate fault: this case must fail."""
    backward = fused._softmax_backward
    with mock.patch.object(fused, "_softmax_backward", lambda g, phi: backward(g, phi) * phi.sum().item()):
        train("teamlora")


def main(file: str, *only: str) -> None:
    """Writes {case: None, or why it failed}. only: cases to run; all by default."""
    outcomes = {}
    for name in only or CASES:
        try:
            CASES[name]()
            outcomes[name] = None
        except Exception:
            outcomes[name] = traceback.format_exc()
    with open(file, "w") as out:
        json.dump(outcomes, out)


if __name__ == "__main__":
    main(*sys.argv[1:])
