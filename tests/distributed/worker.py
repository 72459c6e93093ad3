"""One rank: runs every case in one process group and leaves what it saw for the tests to judge.

python -m tests.distributed.worker BASE FOLDER      (with RANK, WORLD_SIZE, ... set)
"""

import json
import os
import sys
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from deepspeed.utils import safe_get_full_grad
from safetensors.torch import save_file
from torch import Tensor

import trainer.training.train
from data_prep.user_error import UserError
from tests.support import scene
from tests.support.engine_bytes import copied_bytes, learning_bytes
from tests.support.tiny_models import FAMILIES
from trainer.adapters.adapter_writer import save_adapter
from trainer.adapters.attach import attach_adapter
from trainer.base.loader import load_opened
from trainer.base.weight_map import open_base
from trainer.checkpoint.async_saver import AsyncSaver
from trainer.checkpoint.trained_state import TrainedState
from trainer.console.library_logs import silence_libraries
from trainer.distributed.engine import gather_trainable, read_deepspeed_config
from trainer.distributed.expert_shard import merge_own
from trainer.distributed.process_group import process_group, raise_on_all_ranks
from trainer.distributed.rank_check import check_ranks_agree, gather_rank_facts
from trainer.distributed.zero3_sharding import Zero3Sharding
from trainer.errors import TrainingFault
from trainer.objective.batches import plan_batches
from trainer.recipe import Recipe
from trainer.run.launch_protocol import LAUNCH_ID
from trainer.telemetry.startup import bytes_on_this_rank
from trainer.training.loop import Parts, held_out_losses, run_step
from trainer.training.train import assemble, sharding_for

# name: (micro batch size, accumulation, changes of the recipe)
PARITY: dict[str, tuple[int, int, dict[str, Any]]] = {
    "plain": (3, 1, {}),
    "accumulated": (1, 3, {}),
    "checkpointed": (3, 1, {"train__activation_checkpointing": True}),
    "accumulated_checkpointed": (1, 3, {"train__activation_checkpointing": True}),
    "offloaded": (1, 3, {"deepspeed__config": "ds_configs/zero3_offload.json"}),
    "zero2": (1, 3, {"deepspeed__config": "ds_configs/zero2.json"}),
    "moelora": (1, 2, {"adapter__method": "moelora"}),
    "hydralora": (1, 2, {"adapter__method": "hydralora"}),
}


def placed(size: int, dispatch: str, **changes: Any) -> dict[str, Any]:
    return {"experts__parallel_size": size, "experts__dispatch": dispatch, "train__steps": 10, **changes}


PARITY |= {
    f"{dispatch}_{size}{'_accumulated' * (a > 1)}{'_checkpointed' * c}": (
        4 - a,
        a,
        placed(size, dispatch, train__activation_checkpointing=c),
    )
    for size in (2, 4)
    for dispatch in ("weights", "tokens")
    for a in (1, 3)
    for c in (False, True)
}
OFFLOAD = "ds_configs/zero3_offload.json"
PARITY |= {
    "weights_replicated": (1, 2, placed(2, "weights", experts__replicate=True)),
    "tokens_replicated": (1, 2, placed(2, "tokens", experts__replicate=True)),
    "weights_offloaded": (1, 2, placed(2, "weights", deepspeed__config=OFFLOAD)),
    "tokens_offloaded": (1, 2, placed(2, "tokens", deepspeed__config=OFFLOAD)),
    "weights_moelora": (1, 2, placed(2, "weights", adapter__method="moelora")),
    "tokens_moelora": (1, 2, placed(2, "tokens", adapter__method="moelora")),
    "weights_hydralora": (1, 2, placed(2, "weights", adapter__method="hydralora")),
    "tokens_hydralora": (1, 2, placed(2, "tokens", adapter__method="hydralora")),
    "auto": (1, 2, placed(2, "auto")),  # micro-batches on both sides of where it switches
}
# in bf16 nothing equals one process to 1e-5; placed ranks are compared with the same ranks without placement
BF16: dict[str, tuple[int, int, dict[str, Any]]] = {
    "bf16_unplaced": (2, 1, placed(1, "auto", base__dtype="bf16")),
    "bf16_weights": (2, 1, placed(2, "weights", base__dtype="bf16")),
    "bf16_tokens": (2, 1, placed(2, "tokens", base__dtype="bf16")),
}
# changes of the recipe under which saving, generation and held-out losses are tried
PLACEMENTS: dict[str, dict[str, Any]] = {
    "unplaced": {},
    "by_weights": {"experts__parallel_size": 2, "experts__dispatch": "weights"},
    "by_tokens": {"experts__parallel_size": 2, "experts__dispatch": "tokens"},
}
# cases that one number of ranks is enough for; replicas there are only on more ranks than a group has
ONLY = {name: 4 if "replicated" in name else 2 for name in list(PARITY)[-9:]}
# changes of the recipe under which what a rank holds is compared with what was estimated
HELD: dict[str, dict[str, Any]] = {
    "nf4": {},
    "plain": {"base__quantization": "none"},
    "bf16": {"base__dtype": "bf16"},
    "offloaded": {"base__dtype": "bf16", "deepspeed__config": OFFLOAD},
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
}
# (ZeRO stage, compute dtype, what is spoilt)
FAULTS = [
    (s, d, k)
    for s, d in ((0, "fp32"), (0, "bf16"), (2, "fp32"), (3, "fp32"), (3, "bf16"))
    for k in ("loss", "gradient")
]
UNLABELLED_ROW = 2  # in one micro-batch of some rank nothing is labelled


def main(base: Path, folder: Path) -> None:
    silence_libraries()
    with process_group() as device:
        for name in (*cases(dist.get_world_size()), *BF16):
            parity(parity_recipe(base, name, dist.get_world_size()), folder / name, device)
        for case in (shards, held, held_out, routers, saving, mistakes, faults):
            case(base, folder, device)
        dist.barrier()


def cases(world: int) -> list[str]:
    """The cases of PARITY that this many ranks can run."""
    sizes = {name: changes.get("experts__parallel_size", 1) for name, (*_, changes) in PARITY.items()}
    return [name for name, size in sizes.items() if world % size == 0 and ONLY.get(name, world) == world]


def parity(recipe: Recipe, folder: Path, device: torch.device) -> None:
    """Some steps of the real loop; at each: parameters before, gradients, loss, norm, router means."""
    model, parts = build(recipe, device, plan_rows(recipe), [])
    values = {"losses": [], "norms": [], "means": []}
    for step in range(1, recipe.train.steps + 1):
        before = gather_trainable(model)
        gradients: dict[str, Tensor] = {}
        watch_gradients(model, parts.engine, gradients)
        report = run_step(parts, step)
        values["losses"].append(report.losses.mean())
        values["norms"].append(report.grad_norm)
        values["means"].append(report.router.weights.tolist())
        keep(folder / f"before-{step}.safetensors", before)
        keep(folder / f"gradients-{step}.safetensors", gradients)
    keep(folder / "values.json", values)


def parity_recipe(base: Path, name: str, world: int) -> Recipe:
    micro, accumulation, changes = (PARITY | BF16)[name]
    return scene.recipe(
        base, train__global_batch_size=world * micro * accumulation, train__micro_batch_size=micro, **changes
    )


def plan_rows(recipe: Recipe) -> list:
    return scene.rows(3 * recipe.train.global_batch_size, seed=5, unlabelled=(UNLABELLED_ROW,))


def build(recipe: Recipe, device: torch.device, train: list, held_out: list) -> tuple[Any, Parts]:
    plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, plan)
    loaded = load_opened(open_base(recipe.base), sharding_for(config, device))
    with mock.patch.object(trainer.training.train, "attach_adapter", attach_awake):
        model, router_stats, engine = assemble(recipe, loaded, config, len(scene.TASKS), recipe.train.steps)
    return model, Parts(
        engine, router_stats, scene.prepared(train, held_out), plan, device, recipe.run.seed, 1, len(held_out)
    )


def attach_awake(*args: Any) -> Any:
    model = attach_adapter(*args)
    scene.wake_experts(model)
    return model


def watch_gradients(model: Any, engine: Any, found: dict[str, Tensor]) -> None:
    """Reads the averaged gradients where the optimizer is about to use them."""
    step = type(engine).step

    def observe_routers(*args: Any, **kwargs: Any) -> Any:
        if engine.is_gradient_accumulation_boundary():
            trainable = {name: p for name, p in model.named_parameters() if p.requires_grad}
            gradients = {name: safe_get_full_grad(p).detach().float().cpu().clone() for name, p in trainable.items()}
            found.update(merge_own(model, gradients))
        return step(engine, *args, **kwargs)

    engine.step = observe_routers


def shards(base: Path, folder: Path, device: torch.device) -> None:
    """What each rank keeps of the base and of every family of models, straight from the loader."""
    for model_folder in (base, *(scene.families(base) / family for family in FAMILIES)):
        recipe = scene.recipe(model_folder, base__attention="eager")
        plan = plan_batches(recipe.train.global_batch_size, 1, dist.get_world_size())
        opened = open_base(recipe.base)
        model = load_opened(opened, Zero3Sharding(read_deepspeed_config(recipe, plan), device))
        mine = {name: p.ds_tensor.clone() for name, p in model.named_parameters()}
        target = folder / "shards" / model_folder.name
        target.mkdir(parents=True, exist_ok=True)
        save_file(mine, target / f"{dist.get_rank()}.safetensors")
        keep(target / "shapes.json", {name: list(p.ds_shape) for name, p in model.named_parameters()})


def held(base: Path, folder: Path, device: torch.device) -> None:
    """What each rank holds after a step, by category: as the run itself tells it, and as the engine's tensors say."""
    for name, changes in HELD.items():
        recipe = scene.recipe(base, **changes)
        model, parts = build(recipe, device, plan_rows(recipe), [])
        saver = AsyncSaver(TrainedState(parts.engine, model), timedelta(seconds=60))
        run_step(parts, 1)
        stage = parts.engine.zero_optimization_stage()
        told = bytes_on_this_rank(model, stage, dist.get_world_size())
        mine = [told, learning_bytes(parts.engine), copied_bytes(saver)]
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, mine)
        keep(folder / "held" / f"{name}.json", everyone)


def held_out(base: Path, folder: Path, device: torch.device) -> None:
    """Held-out loss in the middle of training, on a number of rows that leaves some ranks without any."""
    for name, changes in PLACEMENTS.items():
        recipe = scene.recipe(base, **changes)
        _, parts = build(recipe, device, plan_rows(recipe), scene.rows(dist.get_world_size() + 1, seed=9))
        values = [held_out_losses(parts)]
        run_step(parts, 1)
        values.append(held_out_losses(parts))
        run_step(parts, 2)
        keep(folder / name / "held_out.json", [[v.loss.tolist(), v.labelled_tokens.tolist()] for v in values])


def routers(base: Path, folder: Path, device: torch.device) -> None:
    """What is measured of the routers by task, from micro-batches in which ranks meet different tasks."""
    for name, changes in PLACEMENTS.items():
        recipe = scene.recipe(base, **changes)
        _, parts = build(recipe, device, plan_rows(recipe), [])
        router = run_step(parts, 1).router
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
        model, parts = build(recipe, device, plan_rows(recipe), [])
        run_step(parts, 1)
        parts.engine.eval()
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
    ranks = gather_rank_facts(scene.recipe(base))
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
    for stage, dtype, kind in FAULTS:
        recipe = scene.recipe(base, stage=stage, base__dtype=dtype)
        model, parts = build(recipe, device, plan_rows(recipe), [])
        run_step(parts, 1)
        before = gather_trainable(model)
        spoil(model, kind)
        try:
            run_step(parts, 2)
            text = "nothing was raised"
        except TrainingFault as fault:
            text = str(fault)
        after = gather_trainable(model)
        told[f"{stage}-{dtype}-{kind}"] = [text, all(torch.equal(before[n], after[n]) for n in before)]
    keep(folder / "faults.json", told)


def spoil(model: Any, kind: str) -> None:
    """A loss, or only a gradient, that is not finite; on the last rank alone."""
    if dist.get_rank() < dist.get_world_size() - 1:
        return
    head = model.get_output_embeddings()
    if kind == "loss":
        head.register_forward_hook(lambda _module, _args, out: out * float("nan"))
    else:
        head.register_full_backward_hook(lambda _module, grads, _out: (grads[0] * float("inf"),))


def keep(path: Path, found: Any) -> None:
    """Writes tensors or JSON on rank 0."""
    if dist.get_rank():
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".json":
        path.write_text(json.dumps(found))
    else:
        save_file({name: tensor.contiguous() for name, tensor in found.items()}, path)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
