"""What rank 0 prints before training starts: facts derived from the recipe, and where the start-up time went."""

import time
from pathlib import Path

import psutil
import torch
from pydantic import ByteSize
from torch import nn

from trainer.distributed.deepspeed_internals import local_shard, whole_shape
from trainer.distributed.expert_shard import experts_elsewhere
from trainer.distributed.parallelize import ParallelModel
from trainer.objective.batches import BatchPlan

RANK_PROGRAMS = ("train.sh", "trainer/__main__.py", "/teamlora")  # what launchers are given, and `teamlora launch`


def describe_run(parallel: ParallelModel, plan: BatchPlan, steps: int, directory: Path, mean_row: float) -> str:
    """Lines about parameters, bytes on this rank, batch, length, and how to watch the run.

    mean_row: mean tokens per training row.
    """
    model = parallel.model
    trainable = sum(_numel(p) for p in model.parameters() if p.requires_grad) + experts_elsewhere(model)
    frozen = sum(_numel(p) for n, p in model.named_parameters() if not (p.requires_grad or n.endswith(".absmax")))
    tokens = plan.global_batch_size * mean_row
    held = bytes_on_this_rank(model, parallel.engine.zero_optimization_stage(), plan.world_size)
    lines = [
        f"parameters      {trainable:,} trainable, {frozen:,} frozen",
        *(
            f"{'bytes per rank' if i == 0 else '':16}{ByteSize(n).human_readable(separator=' '):>10}  {name}"
            for i, (name, n) in enumerate(held.items())
        ),
        f"global batch    {plan.global_batch_size} rows = {plan.micro_batch_size} per micro-batch x {plan.world_size} "
        f"ranks x {plan.gradient_accumulation_steps} accumulation, about {tokens:,.0f} tokens",
        f"length          {steps} steps",
        f"run             {directory}",
        f"watch           tensorboard --logdir {directory}",
    ]
    return "\n".join(lines)


def bytes_on_this_rank(model: nn.Module, zero_stage: int, world_size: int) -> dict[str, int]:
    """Bytes of the model on this rank by category, and those that the first step will add."""
    named = list(model.named_parameters())
    frozen = {name: p for name, p in named if not p.requires_grad}
    absmax = {name for name in frozen if name.endswith(".absmax")}
    packed = {name for name, p in frozen.items() if p.dtype == torch.uint8} - absmax
    trained = [p for _, p in named if p.requires_grad]
    learned = sum(local_shard(p).numel() for p in trained)
    if zero_stage in (1, 2):  # parameters stay whole, their state does not
        learned = -(-learned // world_size)
    return {
        "packed weights": sum(_local_bytes(frozen[name]) for name in packed),
        "absmax": sum(_local_bytes(frozen[name]) for name in absmax),
        "unquantised": sum(_local_bytes(p) for name, p in frozen.items() if name not in packed | absmax),
        "adapter": sum(map(_local_bytes, trained)),
        # fp32 master copy, its gradient, and AdamW's two moments
        "optimizer and gradients, to come": 16 * learned,
    }


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; a packed uint8 weight counts the two 4-bit values of each byte."""
    numel = whole_shape(parameter).numel()
    return 2 * numel if parameter.dtype == torch.uint8 else numel


def _local_bytes(parameter: nn.Parameter) -> int:
    """Bytes of the parameter that stay on this rank: under ZeRO-3 its shard."""
    shard = local_shard(parameter)
    return shard.numel() * shard.element_size()


class StartupTimer:
    """Seconds from the command to the end of the first step, by part.

    Counts from the start of the launch's first process: the launcher's, if there is one.
    """

    def __init__(self) -> None:
        now = time.time()
        mine = psutil.Process()
        launch = min((p.create_time() for p in (mine, *_launchers(mine))), default=now)
        self._parts = [("launcher", mine.create_time() - launch), ("imports", now - mine.create_time())]
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """Records the time since the last lap as that of `name`, and returns it."""
        now = time.perf_counter()
        seconds, self._last = now - self._last, now
        self._parts.append((name, seconds))
        return seconds

    def __str__(self) -> str:
        total = sum(seconds for _, seconds in self._parts)
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self._parts if seconds >= 0.05)
        return f"start-up        {total:.1f} s from the command to the end of the first step: {parts}"


def _launchers(process: psutil.Process) -> list[psutil.Process]:
    """Ancestors that belong to this launch: their command lines name one of the programs that start ranks."""
    found = []
    for parent in process.parents():
        try:
            if any(word.endswith(RANK_PROGRAMS) for word in parent.cmdline()):
                found.append(parent)
        except psutil.Error:
            break
    return found
