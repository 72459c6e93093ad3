"""One rank of `python -m benchmarks.nodes`: steps under each setting and each rate of the link, in turns."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_from_disk

from benchmarks.nodes.setting import Measurement, Plan, recipe_of
from benchmarks.shared.two_nodes import limit_link, sent_over_link
from data_prep.reader import PreparedSet
from tests.support.training import Training, build_training
from trainer.console.library_logs import silence_libraries
from trainer.distributed.process_group import process_group

WARM_UP = 2  # steps: ZeRO-3 learns in the first in which order it gathers


def main(plan: Plan, output: Path) -> None:
    silence_libraries()
    with process_group() as device:
        trainings = {name: build(plan, name, device) for name in plan.settings}
        for training in trainings.values():
            for step in range(1, WARM_UP + 1):
                training.step(step)
        steps = dict.fromkeys(trainings, WARM_UP)
        found: list[Measurement] = []
        for name, rate in plan.schedule:
            if plan.nodes > 1 and dist.get_rank() % plan.ranks_per_node == 0:
                limit_link(rate)
            steps[name] += 1
            found.append(measure(plan, trainings[name], name, rate, steps[name]))
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, found)
        if dist.get_rank() == 0:
            output.write_text(json.dumps([[vars(each) for each in of_rank] for of_rank in everyone]))


def build(plan: Plan, name: str, device: torch.device) -> Training:
    recipe = recipe_of(plan, name)
    prepared = PreparedSet(Path(plan.rows), {"tasks": ["text"]}, load_from_disk(plan.rows).with_format("numpy"), [], [])
    return build_training(recipe, device, prepared)


def measure(plan: Plan, training: Training, name: str, rate: str | None, step: int) -> Measurement:
    """One step: its seconds, and what has left this rank's node meanwhile."""
    dist.barrier()
    before, began = sent_over_link() if plan.nodes > 1 else 0, time.perf_counter()
    report = training.step(step)
    dist.barrier()
    seconds = time.perf_counter() - began
    sent = sent_over_link() - before if plan.nodes > 1 else 0
    return Measurement(dist.get_rank(), name, rate, report.tokens, seconds, sent, report.losses.mean())


if __name__ == "__main__":
    main(Plan(**json.loads(sys.argv[1])), Path(sys.argv[2]))
