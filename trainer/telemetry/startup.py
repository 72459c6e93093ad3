"""What is derived from a recipe before training starts, told once on rank 0; and where the start-up time went."""

import time
from typing import Any

import psutil
import torch
from torch import nn

from trainer.distributed.expert_shard import experts_elsewhere
from trainer.objective.batches import BatchPlan

RANK_PROGRAMS = ("train.sh", "trainer/__main__.py", "/teamlora")  # what launchers are given, and `teamlora launch`
UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def describe_run(model: nn.Module, engine: Any, plan: BatchPlan, steps: int, directory: Any, mean_row: float) -> str:
    """Lines for a person: parameters, bytes this rank holds, batch, length, and how to watch.

    mean_row: mean tokens a training row.
    """
    trainable = sum(_numel(p) for p in model.parameters() if p.requires_grad) + experts_elsewhere(model)
    frozen = sum(_numel(p) for n, p in model.named_parameters() if not (p.requires_grad or n.endswith(".absmax")))
    tokens = plan.global_batch_size * mean_row
    held = bytes_on_this_rank(model, engine.zero_optimization_stage(), plan.world_size)
    lines = [
        f"parameters      {trainable:,} trainable, {frozen:,} frozen",
        *(
            f"{'bytes a rank' if i == 0 else '':16}{format_bytes(n):>10}  {name}"
            for i, (name, n) in enumerate(held.items())
        ),
        f"global batch    {plan.global_batch_size} rows = {plan.micro_batch_size} a micro-batch x {plan.world_size} "
        f"ranks x {plan.gradient_accumulation_steps} accumulation, about {tokens:,.0f} tokens",
        f"length          {steps} steps",
        f"run             {directory}",
        f"watch           tensorboard --logdir {directory}",
    ]
    return "\n".join(lines)


def bytes_on_this_rank(model: nn.Module, zero_stage: int, world_size: int) -> dict[str, int]:
    """Bytes by category that this rank holds of the model, and those that the first step will add."""
    named = list(model.named_parameters())
    frozen = {name: p for name, p in named if not p.requires_grad}
    absmax = {name for name in frozen if name.endswith(".absmax")}
    packed = {name for name, p in frozen.items() if p.dtype == torch.uint8} - absmax
    trained = [p for _, p in named if p.requires_grad]
    learned = sum(getattr(p, "ds_tensor", p).numel() for p in trained)
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


def format_bytes(size: float) -> str:
    """Bytes in the largest unit that leaves at least one: 1536 -> 1.5 KiB."""
    unit = 0
    while size >= 1024 and unit < len(UNITS) - 1:
        size, unit = size / 1024, unit + 1
    return f"{size:.1f} {UNITS[unit]}" if unit else f"{size:.0f} B"


def _numel(parameter: nn.Parameter) -> int:
    """Elements of the whole parameter; a packed uint8 weight counts the two 4-bit values of each byte."""
    numel = getattr(parameter, "ds_numel", parameter.numel())
    return 2 * numel if parameter.dtype == torch.uint8 else numel


def _local_bytes(parameter: nn.Parameter) -> int:
    """Bytes of the parameter that stay on this rank: under ZeRO-3 its shard."""
    held = getattr(parameter, "ds_tensor", parameter)
    return held.numel() * held.element_size()


class StartupTimer:
    """Where the time goes from the command to the first step, in seconds by part.

    Begins when the first process of this launch began: the launcher's, if this one has any.
    """

    def __init__(self) -> None:
        now = time.time()
        mine = psutil.Process()
        launch = min((p.create_time() for p in (mine, *_launchers(mine))), default=now)
        self._parts = [("launcher", mine.create_time() - launch), ("imports", now - mine.create_time())]
        self._last = time.perf_counter()

    def lap(self, name: str) -> float:
        """The time since the last lap, which went into `name`."""
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
