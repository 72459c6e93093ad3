"""Training on a tiny base, whose experts do something from the first step."""

from typing import Any
from unittest import mock

import torch

import trainer.distributed.parallelize
from tests.support import scene
from tests.support.training import Training, build_training
from trainer.adapters.attach import attach_adapter
from trainer.recipe import Recipe


def build(recipe: Recipe, device: torch.device, train: list, held_out: list | None = None) -> Training:
    with mock.patch.object(trainer.distributed.parallelize, "attach_adapter", _attach_awake):
        return build_training(recipe, device, scene.prepared(train, held_out or []))


def _attach_awake(*args: Any) -> Any:
    model = attach_adapter(*args)
    scene.wake_experts(model)
    return model
