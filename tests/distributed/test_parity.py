"""The real loop on 2 and 4 ranks against one process without DeepSpeed: gradients, losses, norms, router means."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.parity_cases import PARITY, by_name
from tests.distributed.reference import Reference
from tests.distributed.worker import SUMMED
from tests.support import scene
from trainer.objective.batches import rows_of_step

pytestmark = pytest.mark.slow


@pytest.fixture(params=PARITY, ids=lambda case: case.name)
def case(request, seen, base):
    """(recipe, folder of what the ranks saw)."""
    world, folder = seen
    if world not in request.param.worlds:
        pytest.skip(f"not a case of {world} ranks")
    return request.param.recipe(base, world), folder / request.param.name


@pytest.fixture
def compared(case):
    """(reference, the rows of each step, folder of what the ranks saw)."""
    recipe, folder = case
    batch = recipe.train.global_batch_size
    rows = scene.training_rows(recipe)
    steps = [[rows[i] for i in rows_of_step(recipe.run.seed, n, len(rows), batch)] for n in range(recipe.train.steps)]
    return Reference(recipe), steps, folder


def test_gradients_from_equal_parameters_equal_those_of_one_process(compared):
    reference, steps, folder = compared
    for step, rows in enumerate(steps, start=1):
        reference.load(load_file(folder / f"before-{step}.safetensors"))
        _, expected = reference.gradients(rows)
        found = load_file(folder / f"gradients-{step}.safetensors")
        assert found.keys() == expected.keys()
        for name, gradient in expected.items():
            assert gradient.norm() > 0, name
            assert (found[name] - gradient).norm() <= 1e-5 * gradient.norm(), (step, name)


def test_losses_norms_and_router_means_equal_those_of_one_process(compared):
    reference, steps, folder = compared
    values = json.loads((folder / "values.json").read_text())
    losses, norms = reference.train(steps)
    assert values["losses"] == pytest.approx(losses, rel=1e-5)
    assert values["norms"] == pytest.approx(norms, rel=1e-5)
    last = torch.tensor(values["means"][-1])
    assert torch.allclose(last, torch.stack(list(reference.means.values())), rtol=0, atol=1e-5)


def test_zero3_gathers_nothing_but_what_each_module_has_itself(case):
    _, folder = case
    assert json.loads((folder / "values.json").read_text())["looked_up"] == []


@pytest.mark.ranks_run("plain", "accumulated")
def test_accumulation_changes_neither_losses_nor_gradients(seen):
    _, folder = seen
    whole, cut = (json.loads((folder / name / "values.json").read_text()) for name in ("plain", "accumulated"))
    assert cut["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    first, second = (load_file(folder / name / "gradients-1.safetensors") for name in ("plain", "accumulated"))
    for name, gradient in first.items():
        assert (second[name] - gradient).norm() <= 1e-5 * gradient.norm(), name


@pytest.mark.ranks_run("summed")
@pytest.mark.parametrize("name", SUMMED)
def test_the_sum_of_many_micro_batches_in_bf16_is_rounded_once(seen, name):
    _, folder = seen
    for of_rank in json.loads((folder / "summed" / f"{name}.json").read_text()):
        assert {parameter: excess for parameter, excess in of_rank.items() if excess > 0} == {}
        assert of_rank


@pytest.mark.ranks_run("bf16_unplaced", "bf16_weights")
def test_weights_that_travel_in_bf16_give_what_the_same_ranks_give_without_placement(seen):
    """Two ranks: bit for bit, sums of two have one rounding. Four: the sum at the owners is rounded less often."""
    world, folder = seen
    expected, found = (bf16(folder, name) for name in ("unplaced", "weights"))
    assert found[0]["losses"][0] == expected[0]["losses"][0]
    if world == 2:
        assert found[0]["losses"] == expected[0]["losses"]
    for name, gradient in expected[1].items():
        assert (found[1][name] - gradient).norm() <= (0 if world == 2 else 2**-8) * gradient.norm(), name


@pytest.mark.ranks_run("bf16_unplaced", "bf16_tokens")
def test_tokens_that_travel_in_bf16_are_as_near_to_fp32_as_the_same_ranks_without_placement(seen, base):
    world, folder = seen
    plain, unplaced = by_name(["plain", "bf16_unplaced"])
    recipe = unplaced.recipe(base, world)
    rows = scene.training_rows(recipe)
    first = [rows[i] for i in rows_of_step(recipe.run.seed, 0, len(rows), recipe.train.global_batch_size)]
    reference = Reference(plain.recipe(base, world))
    reference.load(load_file(folder / "bf16_unplaced" / "before-1.safetensors"))
    loss, exact = reference.gradients(first)
    away = {}
    for name in ("unplaced", "tokens"):
        values, gradients = bf16(folder, name)
        away[name] = torch.stack([(gradients[n] - g).norm() / g.norm() for n, g in exact.items()])
        assert values["losses"][0] == pytest.approx(loss, rel=2**-7)
    assert away["tokens"].mean() <= 1.2 * away["unplaced"].mean()
    assert away["tokens"].max() <= 1.5 * away["unplaced"].max()


def bf16(folder, name):
    """(values, first gradients) of a bf16 run."""
    case = folder / f"bf16_{name}"
    return json.loads((case / "values.json").read_text()), load_file(case / "gradients-1.safetensors")
