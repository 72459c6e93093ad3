"""One rank: runs cases in one process group and leaves what it saw for the tests to judge.

python -m tests.distributed.worker BASE FOLDER NAME,NAME...      (with RANK, WORLD_SIZE, ... set)

A name is that of a ParityCase, or of one of CHECKS.
"""

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from data_prep.user_error import UserError
from tests.distributed.parity_cases import by_name
from tests.support import scene
from tests.support.engine_bytes import copied_bytes, learning_bytes
from tests.support.offload_on_cpu import copied_on_cpu
from tests.support.summed_gradient import SummedGradient
from tests.support.tiny_models import FAMILIES
from tests.support.tiny_training import build
from trainer.adapters.adapter_folder import save_adapter
from trainer.base.loader import load_opened
from trainer.base.weight_map import open_base
from trainer.console.library_logs import silence_libraries
from trainer.distributed.deepspeed_config import read_deepspeed_config
from trainer.distributed.engine import gather_trainable
from trainer.distributed.expert_shard import merge_shards
from trainer.distributed.process_group import process_group
from trainer.distributed.rank_check import check_ranks_agree, gather_rank_facts, raise_on_all_ranks
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.errors import TrainingFault
from trainer.objective.batches import plan_batches
from trainer.recipe import Recipe
from trainer.run.launch_protocol import LAUNCH_ID
from trainer.telemetry.startup import bytes_on_this_rank

# changes of the recipe under which saving, generation and held-out losses are tried
PLACEMENTS: dict[str, dict[str, Any]] = {
    "unplaced": {},
    "by_weights": {"experts__parallel_size": 2, "experts__dispatch": "weights"},
    "by_tokens": {"experts__parallel_size": 2, "experts__dispatch": "tokens"},
    "loss_chunks": {"train__loss_chunk": 4},
}
# changes of the recipe under which what a rank holds is compared with what was estimated
HELD: dict[str, dict[str, Any]] = {
    "nf4": {},
    "plain": {"base__quantization": "none"},
    "bf16": {"base__dtype": "bf16"},
    "offloaded": {"base__dtype": "bf16", "deepspeed__config": "ds_configs/zero3_offload.json"},
    "zero2": {"deepspeed__config": "ds_configs/zero2.json"},
    "placed": {"experts__parallel_size": 2},
    "placed_plain_moelora": {
        "experts__parallel_size": 2,
        "adapter__method": "moelora",
        "base__quantization": "none",
        "base__dtype": "bf16",
    },
    "replicated": {"experts__parallel_size": 2, "experts__replicate": True},
    "eight_bits": {"train__optimizer": "adamw_8bit"},
    "base_whole": {"base__shard_group": 1},
    "adapter_whole": {"adapter__shard_group": 1, "base__dtype": "bf16"},
    "base_in_groups": {"base__shard_group": 2, "deepspeed__config": "ds_configs/zero3_offload.json"},
}
# changes of the recipe under which gradients of many micro-batches are added up
SUMMED: dict[str, dict[str, Any]] = {
    "stage_0": {"stage": 0},
    "stage_2": {"stage": 2},
    "stage_3": {},
    "offloaded": {"deepspeed__config": "ds_configs/zero3_offload.json"},
}
# (ZeRO stage, compute dtype, train.loss_chunk, what is spoilt)
FAULTS = [
    (s, d, c, k)
    for s, d, c in (
        (0, "fp32", None),
        (0, "bf16", None),
        (2, "fp32", None),
        (3, "fp32", None),
        (3, "bf16", None),
        (3, "fp32", 4),
    )
    for k in ("loss", "gradient")
]


def main(base: Path, folder: Path, names: list[str]) -> None:
    silence_libraries()
    with process_group() as device, copied_on_cpu():
        for case in by_name(names):
            parity(case.recipe(base, dist.get_world_size()), folder / case.name, device)
        for name, check in CHECKS.items():
            if name in names:
                check(base, folder, device)
        dist.barrier()


def parity(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Some steps of the real loop; at each: parameters before, gradients, loss, norm, router means."""
    training = build(recipe, device, scene.training_rows(recipe))
    model = training.model
    values = {"losses": [], "norms": [], "means": [], "offloaded": []}
    for step in range(1, recipe.train.steps + 1):
        before = gather_trainable(model)
        gradients: dict[str, Tensor] = {}
        watch_gradients(model, training.engine, gradients)
        report = training.step(step)
        values["losses"].append(report.losses.mean())
        values["norms"].append(report.grad_norm)
        values["means"].append(report.router.weights.tolist())
        values["offloaded"].append(offloaded_inputs(training.trainer.saved_activations))
        keep(folder / f"before-{step}.safetensors", before)
        keep(folder / f"gradients-{step}.safetensors", gradients)
    # What ZeRO-3 found that a forward looked up: it gathers that in every later forward.
    looked_up = [name for name, module in model.named_modules() if getattr(module, "_external_params", None)]
    keep(folder / "values.json", {**values, "looked_up": looked_up})


def offloaded_inputs(saved_activations: Any) -> list[int]:
    """How many layers' inputs left the device in the last micro-batch, and how many came back."""
    stats = getattr(saved_activations, "stats", None)
    return [stats.offloaded_tensors, stats.restored_tensors] if stats else [0, 0]


def watch_gradients(model: Any, engine: Any, found: dict[str, Tensor]) -> None:
    """Reads the averaged gradients where the optimizer is about to use them."""
    step = type(engine).step

    def observed_step(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            gradients = {n: safe_get_full_grad(p).detach().float().cpu().clone() for n, p in trained(model).items()}
            found.update(merge_shards(model, gradients))
        return step(engine, *args, **kwargs)

    engine.step = observed_step


def summed(base: Path, folder: Path, device: torch.device) -> None:
    """By how much a rank's sum of 32 micro-batches' gradients in bf16 is further from the exact one than a rounding."""
    for name, changes in SUMMED.items():
        recipe = scene.recipe(base, base__dtype="bf16", train__global_batch_size=32 * dist.get_world_size(), **changes)
        training = build(recipe, device, scene.training_rows(recipe))
        sums = {n: SummedGradient(p) for n, p in trained(training.model).items()}
        training.step(1)
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, {n: each.excess() for n, each in sums.items()})
        keep(folder / "summed" / f"{name}.json", everyone)


def trained(model: Any) -> dict[str, Any]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def checkpointing(base: Path, folder: Path, device: torch.device) -> None:
    """Two steps of two micro-batches under each value of train.activation_checkpointing, and what left the device."""
    for value in (False, True, "offload"):
        changes = {"train__steps": 2, "train__global_batch_size": 4 * dist.get_world_size()}
        recipe = scene.recipe(base, **changes, train__micro_batch_size=2, train__activation_checkpointing=value)
        parity(recipe, folder / str(value), device)


def shards(base: Path, folder: Path, device: torch.device) -> None:
    """What each rank keeps of the base and of every family of models, straight from the loader."""
    for model_folder in (base, *(scene.families(base) / family for family in FAMILIES)):
        keep_shards(model_folder, folder / "shards" / model_folder.name, device, dist.get_world_size())
    for size in range(1, dist.get_world_size()):
        if dist.get_world_size() % size == 0:
            keep_shards(base, folder / "shards" / f"groups_of_{size}", device, size)


def keep_shards(model_folder: Path, target: Path, device: torch.device, size: int) -> None:
    """What each rank keeps where groups of `size` ranks have a copy each."""
    recipe = scene.recipe(model_folder, base__attention="eager")
    plan = plan_batches(recipe.train.global_batch_size, 1, dist.get_world_size())
    opened = open_base(recipe.base)
    model = load_opened(opened, Zero3Sharding(read_deepspeed_config(recipe, plan), device, size))
    mine = {name: p.ds_tensor.clone() for name, p in model.named_parameters()}
    target.mkdir(parents=True, exist_ok=True)
    save_file(mine, target / f"{dist.get_rank()}.safetensors")
    keep(target / "shapes.json", {name: list(p.ds_shape) for name, p in model.named_parameters()})


def held(base: Path, folder: Path, device: torch.device) -> None:
    """What each rank holds after a step, by category: as the run itself tells it, and as the engine's tensors say."""
    for name, changes in HELD.items():
        recipe = scene.recipe(base, **changes)
        training = build(recipe, device, scene.training_rows(recipe))
        saver = training.saver()
        training.step(1)
        stage = training.engine.zero_optimization_stage()
        reported = bytes_on_this_rank(training.model, stage, dist.get_world_size())
        mine = [reported, learning_bytes(training.engine), copied_bytes(saver)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        keep(folder / "held" / f"{name}.json", everyone)


def held_out(base: Path, folder: Path, device: torch.device) -> None:
    """Held-out loss in the middle of training, on a number of rows that leaves some ranks without any."""
    for name, changes in PLACEMENTS.items():
        recipe = scene.recipe(base, **changes)
        training = build(recipe, device, scene.training_rows(recipe), scene.rows(dist.get_world_size() + 1, seed=9))
        values = [training.held_out_losses()]
        training.step(1)
        values.append(training.held_out_losses())
        training.step(2)
        keep(folder / name / "held_out.json", [[v.loss.tolist(), v.labelled_tokens.tolist()] for v in values])


def routers(base: Path, folder: Path, device: torch.device) -> None:
    """What is measured of the routers by task, from micro-batches in which ranks meet different tasks."""
    for name, changes in PLACEMENTS.items():
        recipe = scene.recipe(base, **changes)
        router = build(recipe, device, scene.training_rows(recipe)).step(1).router
        found = {
            "tokens": router.task_tokens.tolist(),
            "weights": router.weights_by_task.tolist(),
            "entropy": router.entropy_by_task.tolist(),
            "interaction": router.interaction.tolist(),
        }
        keep(folder / name / "routers.json", found)


def saving(base: Path, folder: Path, device: torch.device) -> None:
    """The adapter as published from shards; logits of the sharded model, and what it generates token by token."""
    for name, changes in PLACEMENTS.items():
        recipe = scene.recipe(base, **changes)
        training = build(recipe, device, scene.training_rows(recipe))
        model = training.model
        training.step(1)
        training.engine.eval()
        with torch.no_grad():
            logits = model(input_ids=torch.arange(40).view(2, 20), use_cache=False).logits
            answer = model.generate(input_ids=scene.prompt(), max_new_tokens=8, do_sample=False, use_cache=True)
        parameters = gather_trainable(model)
        if dist.get_rank() == 0:
            save_adapter(model, parameters, folder / name / "adapter")
        keep(folder / name / "outputs.safetensors", {"logits": logits, "answer": answer})


def mistakes(base: Path, folder: Path, _device: torch.device) -> None:
    """A mistake that only the last rank meets, and a rank of another launch: both are raised by all."""
    last = dist.get_rank() == dist.get_world_size() - 1

    def meet() -> None:
        if last:
            raise UserError("the last rank's disk is full")

    def crash() -> None:
        if last:
            raise PermissionError("the last rank cannot look")

    os.environ[LAUNCH_ID] = "before" if last else "now"
    ranks = gather_rank_facts(scene.recipe(base), torch.device("cpu"))
    found = {
        "disk": everyones_answer(meet),
        "crash": everyones_answer(crash),
        "launch": everyones_answer(lambda: check_ranks_agree(ranks, nodes=None)),
    }
    keep(folder / "mistakes.json", found)


def everyones_answer(check: Callable[[], None]) -> list[str]:
    """What each rank raises, by rank; every rank takes part."""
    told = "nothing was raised"
    try:
        with raise_on_all_ranks():
            check()
    except (UserError, TrainingFault, PermissionError) as error:
        told = f"{type(error).__name__}: {error}"
    everyone: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(everyone, told)
    return everyone


def faults(base: Path, folder: Path, device: torch.device) -> None:
    """Non-finite losses and gradients, with and without ZeRO: what is said, and whether weights moved."""
    told = {}
    for stage, dtype, chunk, kind in FAULTS:
        recipe = scene.recipe(base, stage=stage, base__dtype=dtype, train__loss_chunk=chunk)
        training = build(recipe, device, scene.training_rows(recipe))
        model = training.model
        training.step(1)
        before = gather_trainable(model)
        spoil(model, kind)
        try:
            training.step(2)
            text = "nothing was raised"
        except TrainingFault as fault:
            text = str(fault)
        after = gather_trainable(model)
        told[f"{stage}-{dtype}-{chunk}-{kind}"] = [text, all(torch.equal(before[n], after[n]) for n in before)]
    keep(folder / "faults.json", told)


def spoil(model: Any, kind: str) -> None:
    """A loss, or only a gradient, that is not finite; on the last rank alone."""
    if dist.get_rank() < dist.get_world_size() - 1:
        return
    head, norm = model.get_output_embeddings(), model.get_base_model().model.norm
    if kind == "loss":
        head.forward = lambda hidden: F.linear(hidden, head.weight) * float("nan")
    else:
        norm.register_forward_hook(lambda _module, _args, out: spoil_gradient(out))


def spoil_gradient(out: Tensor) -> None:
    if out.requires_grad:
        out.register_hook(lambda gradient: gradient * float("inf"))


def keep(path: Path, found: Any) -> None:
    """Writes tensors or JSON on rank 0."""
    if dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


CHECKS: dict[str, Callable[[Path, Path, torch.device], None]] = {
    "summed": summed,
    "checkpointing": checkpointing,
    "shards": shards,
    "held": held,
    "held_out": held_out,
    "routers": routers,
    "saving": saving,
    "mistakes": mistakes,
    "faults": faults,
}

if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3].split(","))
