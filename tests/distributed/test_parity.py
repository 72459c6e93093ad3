"""The real loop on 2 and 4 ranks against one process without DeepSpeed: gradients, losses, norms, router means."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.reference import Reference
from tests.distributed.worker import PARITY, cases, parity_recipe, plan_rows
from trainer.batches import rows_of_step

pytestmark = pytest.mark.slow


@pytest.fixture(params=PARITY)
def case(request, seen, base):
    """(reference, the rows of each step, folder of what the ranks saw)."""
    world, folder = seen
    if request.param not in cases(world):
        pytest.skip(f"not a case of {world} ranks")
    recipe = parity_recipe(base, request.param, world)
    batch = recipe.train.global_batch_size
    rows = plan_rows(recipe)
    steps = [[rows[i] for i in rows_of_step(recipe.run.seed, n, len(rows), batch)] for n in range(recipe.train.steps)]
    return Reference(recipe), steps, folder / request.param


def test_gradients_from_equal_parameters_equal_those_of_one_process(case):
    reference, steps, folder = case
    for step, rows in enumerate(steps, start=1):
        reference.load(load_file(folder / f"before-{step}.safetensors"))
        _, expected = reference.gradients(rows)
        found = load_file(folder / f"gradients-{step}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), (step, name)


def test_losses_norms_and_router_means_equal_those_of_one_process(case):
    reference, steps, folder = case
    values = json.loads((folder / "values.json").read_text())
    losses, norms = reference.train(steps)
    assert values["losses"] == pytest.approx(losses, rel=1e-5)
    assert values["norms"] == pytest.approx(norms, rel=1e-5)
    last = torch.tensor(values["means"][-1])
    assert torch.allclose(last, torch.stack(list(reference.means.values())), rtol=0, atol=1e-5)


def test_accumulation_changes_neither_losses_nor_gradients(seen):
    _, folder = seen
    whole, cut = (json.loads((folder / name / "values.json").read_text()) for name in ("plain", "accumulated"))
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    first, second = (load_file(folder / name / "gradients-1.safetensors") for name in ("plain", "accumulated"))
    for name, gradient in first.items():
        assert (second[name] - gradient).norm() <= 1e-5 * gradient.norm(), name
