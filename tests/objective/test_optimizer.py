"""The learning rate by step: after warm-up it is transformers', bit for bit."""

import json

import pytest
import torch
from transformers import get_scheduler

from data_prep.user_error import UserError
from trainer.objective.optimizer import build_scheduler, check_warm_up
from trainer.recipe import TrainConfig


def train_config(**changes) -> TrainConfig:
    return TrainConfig.model_validate({"steps": 1, "global_batch_size": 8, "learning_rate": 0.3, **changes})


def rates(scheduler, optimizer, steps: int) -> list[float]:
    found = []
    for _ in range(steps):
        found.append(scheduler.get_last_lr()[0])
        optimizer.step()
        scheduler.step()
    return found


def sgd() -> torch.optim.Optimizer:
    return torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)


@pytest.mark.parametrize("warmup", [0, 1, 3, 7])
@pytest.mark.parametrize("kind", ["cosine", "linear", "constant"])
def test_after_warm_up_the_rates_are_those_of_transformers(kind, warmup):
    ours, theirs = sgd(), sgd()
    name = "constant_with_warmup" if kind == "constant" else kind
    expected = rates(get_scheduler(name, theirs, num_warmup_steps=warmup, num_training_steps=23), theirs, 23)
    found = rates(build_scheduler(train_config(lr_scheduler=kind, warmup_steps=warmup), ours, 23), ours, 23)
    assert found[warmup:] == expected[warmup:]
    assert found[:warmup] == pytest.approx([0.3 * (step + 1) / warmup for step in range(warmup)])


def test_its_state_is_that_of_transformers_schedules_so_older_checkpoints_resume():
    ours, theirs = sgd(), sgd()
    old = get_scheduler("cosine", theirs, num_warmup_steps=2, num_training_steps=10)
    rates(old, theirs, 5)
    scheduler = build_scheduler(train_config(warmup_steps=2), ours, 10)
    scheduler.load_state_dict(json.loads(json.dumps(old.state_dict())))
    assert scheduler.state_dict() == old.state_dict()
    ours.step(), theirs.step()
    scheduler.step(), old.step()
    assert scheduler.get_last_lr() == old.get_last_lr()


@pytest.mark.parametrize(
    ("changes", "steps", "key"),
    [
        ({"warmup_steps": 3}, 3, "train.warmup_steps=3"),
        ({"warmup_ratio": 0.9}, 5, None),
        ({"warmup_ratio": 0.91}, 5, "train.warmup_ratio=0.91"),
        ({"warmup_ratio": 0.99}, 1, "train.warmup_ratio=0.99"),
        ({"warmup_steps": 2}, 3, None),
        ({}, 1, None),
    ],
)
def test_a_warm_up_may_not_take_all_steps(changes, steps, key):
    if key is None:
        check_warm_up(train_config(**changes), steps)
        return
    with pytest.raises(UserError, match=f"^{key}: the run has {steps} steps, so it would end before"):
        check_warm_up(train_config(**changes), steps)
