"""Numbers that describe routers, computed alike while training and from a finished run."""

from collections.abc import Sequence
from typing import Any, TypeVar

import numpy as np
import torch
from torch import Tensor

from trainer.adapters.router_stats import RouterReport, by_decoder_layer

Array = TypeVar("Array", Tensor, np.ndarray)


def router_record(router: RouterReport, tasks: Sequence[str]) -> dict[str, Any]:
    """The routers' numbers as means over adapted linears: weights are of phi, entropies in nats.

    task_distance: half the sum over k of |mean phi of the task - mean phi of all tokens|, from 0 to 1.

    Only with an interaction matrix: omega (weights after competition), the mean over layers of |M - 1| (Frobenius;
    where M is square), and the largest entry off its diagonal.
    """
    weights, entropies = router.weights_by_task.mean(0), router.entropy_by_task.mean(0)
    distances = task_distance(router.weights_by_task, router.weights).mean(0)
    seen = [(index, task) for index, task in enumerate(tasks) if router.task_tokens[index] > 0]
    by_layer = by_decoder_layer(router.names, router.weights)
    record = {
        "router_weight": router.weights.mean(0).tolist(),
        "router_weight_by_task": {task: weights[index].tolist() for index, task in seen},
        "router_weight_by_layer": {f"{layer:03}": values.tolist() for layer, values in by_layer.items()},
        "router_entropy": router.entropy.mean().item(),
        "router_entropy_share": router.entropy_share,
        "router_entropy_by_task": {task: entropies[index].item() for index, task in seen},
        "router_balance": router.balance,
        "router_task_distance": {task: distances[index].item() for index, task in seen},
    }
    if router.omega is not None:
        record["router_omega"] = router.omega.mean(0).tolist()
    if router.interaction is not None:
        record |= interaction_record(router.interaction)
    return record


def interaction_record(interaction: Tensor) -> dict[str, float]:
    """How far M [layers, experts, k] is from the identity; {} where it is not square, since experts were changed."""
    if interaction.shape[1] != interaction.shape[2]:
        return {}
    off = interaction - torch.eye(interaction.shape[1], device=interaction.device)
    off_diagonal = interaction - torch.diag_embed(interaction.diagonal(dim1=1, dim2=2))
    return {
        "router_interaction_distance": off.flatten(1).norm(dim=1).mean().item(),
        "router_interaction_off_diagonal": off_diagonal.abs().max().item(),
    }


def task_distance(by_task: Array, overall: Array) -> Array:
    """[layers, tasks]: half the L1 distance between a task's mean phi and that of all tokens, from 0 to 1.

    0: the router treats the task like any other; 1: the task has experts of its own. NaN for tasks without tokens.
    by_task [layers, tasks, k], overall [layers, k].
    """
    return abs(by_task - overall[:, None]).sum(2) / 2
