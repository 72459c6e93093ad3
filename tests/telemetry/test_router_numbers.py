"""What is told of routers while training: numbers with known values, and pictures only as time allows."""

import math

import pytest
import torch

from trainer.adapters.router_stats import RouterReport
from trainer.telemetry.metrics import scalars
from trainer.telemetry.router_images import FIRST_GUESS, SHARE, RouterImages
from trainer.telemetry.router_numbers import interaction_record, router_record, task_distance

NAMES = tuple(f"layers.{layer}.mlp.{kind}.teamlora_experts.default" for layer in (0, 1) for kind in ("up", "down"))
TASKS = ["sums", "words", "absent"]


def report_of(interaction: torch.Tensor | None = None) -> RouterReport:
    """Two tasks, one of which uses experts alike and the other the first expert only."""
    alike, first = [0.25] * 4, [1.0, 0.0, 0.0, 0.0]
    by_task = torch.tensor([alike, first, [float("nan")] * 4]).expand(4, 3, 4)
    return RouterReport(
        names=NAMES,
        weights=torch.tensor([0.625, 0.125, 0.125, 0.125]).expand(4, 4),
        entropy=torch.full((4,), math.log(4) / 2),
        task_tokens=torch.tensor([10.0, 10.0, 0.0]),
        weights_by_task=by_task,
        entropy_by_task=torch.tensor([math.log(4), 0.0, float("nan")]).expand(4, 3),
        interaction=interaction,
    )


def test_numbers_of_a_report():
    record = router_record(report_of(), TASKS)
    assert record["router_weight_by_task"] == {"sums": [0.25] * 4, "words": [1, 0, 0, 0]}
    assert record["router_weight_by_layer"] == {"000": [0.625, *[0.125] * 3], "001": [0.625, *[0.125] * 3]}
    assert record["router_entropy_by_task"] == {"sums": pytest.approx(math.log(4)), "words": 0}
    assert record["router_entropy_share"] == pytest.approx(0.5)
    assert record["router_task_distance"] == {"sums": pytest.approx(0.375), "words": pytest.approx(0.375)}
    assert record["router_balance"] == pytest.approx(0.375**2 + 3 * 0.125**2)
    assert not {"router_omega", "router_interaction_distance"} & record.keys()


def test_task_distance_is_the_same_for_tensors_and_arrays():
    by_task = torch.tensor([[[1.0, 0.0], [0.5, 0.5], [0.25, 0.75]]])
    overall = torch.tensor([[0.75, 0.25]])
    expected = [[0.25, 0.25, 0.5]]
    assert task_distance(by_task, overall).tolist() == expected
    assert task_distance(by_task.numpy(), overall.numpy()).tolist() == expected


def test_numbers_of_interaction_matrices():
    swapped = torch.eye(4)[[1, 0, 2, 3]]
    record = router_record(report_of(torch.stack([torch.eye(4), torch.eye(4), swapped, swapped])), TASKS)
    assert record["router_omega"] == pytest.approx([0.375, 0.375, 0.125, 0.125])
    assert record["router_interaction_distance"] == pytest.approx(1)  # |swap - 1| is 2
    assert record["router_interaction_off_diagonal"] == 1
    assert interaction_record(torch.ones(2, 5, 4)) == {}


def test_tags_of_scalars():
    tags = dict(scalars(router_record(report_of(torch.eye(4).expand(4, 4, 4)), TASKS)))
    assert tags["router/weight/expert_0"] == pytest.approx(0.625)
    assert tags["router_by_task/weight_by_task/words/expert_0"] == 1
    assert tags["router_by_layer/weight_by_layer/001/expert_3"] == pytest.approx(0.125)
    assert tags["router/entropy_by_task/sums"] == pytest.approx(math.log(4))
    assert tags["router/interaction_distance"] == 0


class Clock:
    now = 0.0

    def __call__(self) -> float:
        return self.now


def test_pictures_wait_until_they_are_a_small_share_of_the_time():
    clock = Clock()
    pictures = RouterImages(TASKS, clock)
    clock.now = 2 * FIRST_GUESS / SHARE
    assert not pictures.due()  # nothing was measured
    pictures.add(report_of())
    assert pictures.due()
    clock.now = 0.9 * FIRST_GUESS / SHARE
    assert not pictures.due()


def test_time_spent_on_drawing_puts_the_next_one_off():
    clock = Clock()
    pictures = RouterImages(TASKS, clock)
    clock.now = 100.0
    pictures.add(report_of(torch.eye(4).expand(4, 4, 4)))
    original = pictures._figures

    def slow(newest: RouterReport) -> dict:
        clock.now += 3
        return original(newest)

    pictures._figures = slow
    drawn = pictures.draw()
    assert drawn.keys() == {"router/layers_x_experts", "router/tasks_x_experts", "router/interaction"}
    assert all(pixels.ndim == 3 and pixels.shape[2] == 3 for pixels in drawn.values())
    pictures.add(report_of())
    clock.now = 6 / SHARE - 1
    assert not pictures.due()
    clock.now = 6 / SHARE + 1
    assert pictures.due()


def test_methods_without_a_matrix_have_the_other_pictures_and_none_are_drawn_of_nothing():
    pictures = RouterImages(TASKS)
    assert pictures.draw() == {}
    pictures.add(report_of())
    assert pictures.draw().keys() == {"router/layers_x_experts", "router/tasks_x_experts"}
