"""What a step trains on: counts of all its rows, and whether it is to begin at all."""

from pathlib import Path

import pytest
import torch
import torch.distributed as dist

from tests.support import scene
from trainer.distributed.parallelize import ParallelModel
from trainer.objective.batches import BatchPlan
from trainer.training.trainer import Trainer


@pytest.fixture
def trainer(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    prepared = scene.prepared(scene.rows(4, seed=8, unlabelled=(1,)), [])
    nothing = ParallelModel(None, None, None, None, None, None)
    yield Trainer(
        scene.recipe(Path("unused")), nothing, prepared, BatchPlan(4, 2, 1), torch.device("cpu"), total_steps=3
    )
    dist.destroy_process_group()


def test_counts_are_those_of_all_rows_without_padding(trainer):
    given = trainer.next_input()
    rows = trainer.prepared.train  # a step of four rows sees each of them
    assert given.tokens == sum(len(row["input_ids"]) for row in rows)
    assert given.labelled_tokens == sum(1 for row in rows for label in row["labels"] if label >= 0)
    assert [len(batch["input_ids"]) for batch in given.batches] == [2, 2]


@pytest.mark.parametrize("asked", [False, True])
def test_a_stop_that_was_asked_for_is_known_with_the_counts(trainer, asked):
    assert trainer.next_input(asked).stop_asked == asked
