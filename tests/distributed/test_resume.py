"""A run that is saved and gone on with, on the same ranks and on others: equal to the unbroken one."""

import json

import pytest
import torch
from safetensors.torch import load_file

from tests.distributed.resume_worker import LAYOUTS, ROUTES, SAVED_AT, STEPS, WORLDS, dtypes
from tests.support.ranks import run_ranks

pytestmark = pytest.mark.slow
EIGHT_BITS = "2-eight_bits"
HERE = [f"{world}-{name}" for world in WORLDS for name in LAYOUTS[world] if f"{world}-{name}" != EIGHT_BITS]


@pytest.fixture(scope="module")
def runs(base, tmp_path_factory):
    """Folder of what ranks left that saved and ranks that went on: LAYOUT-DTYPE/ and LAYOUT-DTYPE/from-LAYOUT/."""
    folder = tmp_path_factory.mktemp("resume")
    for mode in ("save", "go_on"):
        for world in WORLDS:
            run_ranks(world, ["-m", "tests.distributed.resume_worker", mode, str(base), str(folder)])
    return folder


def values(folder):
    return torch.tensor(json.loads((folder / "values.json").read_text()), dtype=torch.float64)


@pytest.mark.parametrize(("layout", "dtype"), [(name, dtype) for name in HERE for dtype in dtypes(int(name[0]))])
def test_on_the_same_ranks_every_bit_is_that_of_the_unbroken_run(runs, layout, dtype):
    unbroken = runs / f"{layout}-{dtype}"
    found = unbroken / f"from-{layout}"
    assert len(values(unbroken)) == STEPS
    assert torch.equal(values(found), values(unbroken)[SAVED_AT:])
    expected, adapter = (load_file(folder / "adapter.safetensors") for folder in (unbroken, found))
    assert expected.keys() == adapter.keys()
    assert all(torch.equal(adapter[name], tensor) for name, tensor in expected.items())


@pytest.mark.parametrize(("source", "layout"), [(source, target) for source in ROUTES for target in ROUTES[source]])
def test_on_other_ranks_losses_and_norms_are_those_of_the_unbroken_run(runs, layout, source):
    found = values(runs / f"{layout}-fp32" / f"from-{source}")
    expected = values(runs / f"{source}-fp32")[SAVED_AT:]
    assert len(found) == STEPS - SAVED_AT
    assert torch.allclose(found, expected, rtol=1e-5, atol=0)


def test_with_moments_in_eight_bits_it_goes_on_to_within_their_rounding(runs):
    found, unbroken = values(runs / f"{EIGHT_BITS}-fp32" / f"from-{EIGHT_BITS}"), values(runs / f"{EIGHT_BITS}-fp32")
    assert torch.allclose(found, unbroken[SAVED_AT:], rtol=1e-4, atol=0)


@pytest.mark.parametrize(
    ("layout", "dtype"), [(name, dtype) for name in (*HERE, EIGHT_BITS) for dtype in dtypes(int(name[0]))]
)
def test_after_the_last_step_the_adapter_of_a_checkpoint_can_be_had_again(runs, layout, dtype):
    run = runs / f"{layout}-{dtype}"
    saved = load_file(run / f"step-{SAVED_AT:06d}" / "state-00001.safetensors")
    found, last = (load_file(run / f"{name}.safetensors") for name in ("back", "adapter"))
    for name, tensor in found.items():
        assert torch.equal(tensor, saved[f"parameter/{name}"].to(tensor.dtype))
    assert any(not torch.equal(tensor, last[name]) for name, tensor in found.items())


def test_one_save_holds_no_frozen_weight_and_nothing_of_ranks(runs):
    names = {}
    for layout in (*HERE, EIGHT_BITS):
        folder = runs / f"{layout}-fp32" / f"step-{SAVED_AT:06d}"
        tensors = load_file(folder / "state-00001.safetensors")
        names[layout] = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        assert {path.suffix for path in folder.iterdir()} == {".json", ".safetensors"}
    assert all(found == names[HERE[0]] for found in names.values())
    assert {name.partition("/")[0] for name in names[HERE[0]]} == {"parameter", "exp_avg", "exp_avg_sq"}
    assert not [name for name in names[HERE[0]] if "teamlora_experts" not in name]
