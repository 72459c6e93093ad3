"""Which rows go where: each row once an epoch and once a batch, as a function of seed and step alone."""

import random

import pytest
import torch

from data_prep.user_error import UserError
from tests.support import scene
from tests.support.tiny_adapters import adapted
from tests.support.tiny_models import tiny_llama
from trainer.adapters.router_stats import RouterStats
from trainer.objective.batches import (
    BatchPlan,
    collate,
    count_tokens,
    empty_batch,
    micro_batches_of,
    plan_batches,
    rows_of_step,
    steps_in,
)
from trainer.objective.loss import LabelledLoss


@pytest.mark.parametrize(("num_rows", "batch"), [(12, 4), (10, 4), (7, 3), (3, 8), (1, 1)])
def test_each_epoch_is_one_permutation_and_epochs_follow_on(num_rows, batch):
    steps = 3 * num_rows  # reach at least three whole epochs
    stream = [row for step in range(steps) for row in rows_of_step(5, step, num_rows, batch)]
    epochs = [stream[start : start + num_rows] for start in range(0, 3 * num_rows, num_rows)]
    assert len(stream) == steps * batch
    assert all(sorted(epoch) == list(range(num_rows)) for epoch in epochs)


def test_rows_depend_on_seed_and_step_and_on_nothing_else():
    in_order = [rows_of_step(3, step, 100, 8) for step in range(30)]
    random.seed(1)
    torch.manual_seed(1)
    resumed = {step: rows_of_step(3, step, 100, 8) for step in reversed(range(30))}
    assert [resumed[step] for step in range(30)] == in_order
    assert rows_of_step(4, 0, 100, 8) != in_order[0]


def test_epochs_differ_in_their_order():
    first, second = (rows_of_step(0, epoch, 50, 50) for epoch in (0, 1))
    assert first != second


@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
@pytest.mark.parametrize("micro_batch_size", [1, 2])
def test_ranks_cover_each_row_of_a_batch_once_whatever_their_number(world_size, micro_batch_size):
    rows = random.Random(0).sample(range(1000), 24)
    plan = plan_batches(24, micro_batch_size, world_size)
    by_rank = [list(micro_batches_of(rows, plan, rank)) for rank in range(world_size)]
    assert sorted(row for batches in by_rank for batch in batches for row in batch) == sorted(rows)
    assert {len(batches) for batches in by_rank} == {24 // (micro_batch_size * world_size)}
    assert {len(batch) for batches in by_rank for batch in batches} == {micro_batch_size}
    in_turn = [row for together in zip(*by_rank, strict=True) for batch in together for row in batch]
    assert in_turn == rows  # so that the same step sees the same rows in the same order on any number of ranks


@pytest.mark.parametrize(("batch", "micro", "ranks", "steps"), [(16, 2, 4, 2), (8, 8, 1, 1), (6, 1, 2, 3)])
def test_accumulation_is_what_the_ranks_leave_of_the_batch(batch, micro, ranks, steps):
    assert plan_batches(batch, micro, ranks) == BatchPlan(batch, micro, ranks)
    assert plan_batches(batch, micro, ranks).gradient_accumulation_steps == steps


@pytest.mark.parametrize(("batch", "micro", "ranks", "nearest"), [(30, 4, 2, 32), (19, 4, 2, 16), (3, 4, 2, 8)])
def test_a_batch_that_cannot_be_cut_evenly_names_the_nearest_that_can(batch, micro, ranks, nearest):
    message = (
        rf"global_batch_size={batch} is not divisible by .*={micro} x {ranks} ranks = {micro * ranks}; .*: {nearest}$"
    )
    with pytest.raises(UserError, match=message):
        plan_batches(batch, micro, ranks)


@pytest.mark.parametrize(
    ("epochs", "rows", "batch", "steps"),
    [
        (1, 10, 5, 2),
        (1, 11, 5, 3),
        (0.5, 10, 5, 1),
        (3, 7, 2, 11),
        (1.1, 50, 1, 55),
        (2.2, 25, 1, 55),
        (1e-5, 10, 5, 1),
    ],
)
def test_steps_see_every_row_for_the_epochs_asked_and_no_more(epochs, rows, batch, steps):
    assert steps_in(epochs, rows, batch) == steps


def test_collate_pads_with_a_document_of_its_own_and_scores_no_first_token():
    rows = [
        {
            "input_ids": [5, 6, 7, 8, 9],
            "labels": [5, -100, 7, 8, 9],  # two documents, both scored from their first token
            "position_ids": [0, 1, 2, 0, 1],
            "task_ids": [1, 1, 1, 0, 0],
        },
        {"input_ids": [3, 4], "labels": [-100, 4], "position_ids": [0, 1], "task_ids": [2, 2]},
    ]
    batch = collate(rows)
    lists = {name: value.tolist() if torch.is_tensor(value) else value for name, value in batch.items()}
    assert lists == {
        "input_ids": [[5, 6, 7, 8, 9], [3, 4, 0, 0, 0]],
        "labels": [[-100, -100, 7, -100, 9], [-100, 4, -100, -100, -100]],
        "position_ids": [[0, 1, 2, 0, 1], [0, 1, 0, 1, 2]],
        "task_ids": [[1, 1, 1, 0, 0], [2, 2, -1, -1, -1]],
        "predicting": [1, 3, 5],  # the places before tokens 7 and 9, and in the second row before token 4
        "document_starts": [0, 3, 5, 7, 10],
        "longest_document": 3,
    }
    assert {tensor.dtype for tensor in batch.values() if torch.is_tensor(tensor)} == {torch.int64, torch.int32}


def test_rows_of_a_multiple_of_tokens_have_the_same_loss_and_gradients(tmp_path):
    """In fp32 and within the order of summation."""
    rows, found = scene.rows(2, seed=6), []
    model = adapted(tiny_llama(tmp_path), "teamlora")
    stats = RouterStats(model, len(scene.TASKS))
    for multiple in (1, 64):
        batch = collate(rows, multiple)
        stats.begin_step(count_tokens([batch])[1], measure=False)
        stats.begin_micro_batch(batch["task_ids"])
        loss, by_task = LabelledLoss(model, stats, len(scene.TASKS))(batch, 10, 1.0)
        trained = [p for p in model.parameters() if p.requires_grad]
        found.append([loss, by_task.loss, by_task.labelled_tokens, *torch.autograd.grad(loss, trained)])
        assert count_tokens([batch]) == count_tokens([collate(rows)])
    assert batch["input_ids"].shape == (2, 64)
    for plain, padded in zip(*found, strict=True):
        assert torch.allclose(plain, padded, rtol=1e-4, atol=1e-5)


def test_an_empty_batch_has_tokens_but_no_labels_and_no_task():
    batch = empty_batch()
    assert batch["input_ids"].numel() > 0
    assert (batch["labels"] == -100).all() and (batch["task_ids"] == -1).all()
    assert len({batch[name].shape for name in ("input_ids", "labels", "position_ids", "task_ids")}) == 1
