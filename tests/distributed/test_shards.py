"""What ranks keep of the base: put together, it is bit for bit what bitsandbytes makes of the whole tensors."""

import json
import math
from collections.abc import Iterable
from pathlib import Path

import bitsandbytes.functional as bnb
import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from tests.support import scene
from tests.support.tiny_models import FAMILIES
from trainer.base.loader import load_base

pytestmark = [pytest.mark.slow, pytest.mark.ranks_run("shards")]


def whole(folder: Path, ranks: Iterable[int]) -> dict[str, torch.Tensor]:
    """Every parameter put together from the shards of these ranks."""
    shards = [load_file(folder / f"{rank}.safetensors") for rank in ranks]
    shapes = json.loads((folder / "shapes.json").read_text())
    flat = {name: torch.cat([s[name] for s in shards])[: math.prod(shape)] for name, shape in shapes.items()}
    return {name: tensor.view(shapes[name]) for name, tensor in flat.items()}


@pytest.fixture
def gathered(seen):
    world, folder = seen
    return whole(folder / "shards" / "base", range(world))


@pytest.fixture(scope="module")
def original(base):
    return AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)


def test_packed_weights_and_absmax_equal_bitsandbytes_on_the_whole_tensor(gathered, original, base):
    packed = [name.removesuffix(".absmax") for name in gathered if name.endswith(".absmax")]
    assert len(packed) == 3 * 7
    sizes = {original.get_submodule(name).weight.numel() for name in packed}
    assert any(size % (64 * 4) for size in sizes), "no tensor that is unaligned"
    for name in packed:
        weight = original.get_submodule(name).weight.detach()
        codes, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
        assert torch.equal(gathered[f"{name}.weight"], codes.flatten()), name
        assert torch.equal(gathered[f"{name}.absmax"], state.absmax), name


def test_what_is_not_quantised_equals_the_files(gathered, original):
    plain = {name for name, tensor in gathered.items() if tensor.dtype != torch.uint8}
    assert {"model.embed_tokens.weight", "model.norm.weight"} <= plain
    for name in plain:
        assert torch.equal(gathered[name], original.get_parameter(name)), name


@pytest.mark.parametrize("family", FAMILIES)
def test_shards_of_every_family_are_parts_of_what_one_process_loads(seen, base, family):
    world, folder = seen
    recipe = scene.recipe(scene.families(base) / family, base__attention="eager")
    expected = dict(load_base(recipe.base, "cpu").named_parameters())
    found = whole(folder / "shards" / family, range(world))
    assert found.keys() == expected.keys()
    for name, parameter in expected.items():
        assert torch.equal(found[name], parameter), name


def test_each_rank_keeps_its_part_of_every_parameter_and_no_more(seen):
    world, folder = seen
    shapes = json.loads((folder / "shards" / "base" / "shapes.json").read_text())
    for rank in range(world):
        for name, shard in load_file(folder / "shards" / "base" / f"{rank}.safetensors").items():
            assert shard.numel() == -(-math.prod(shapes[name]) // world), (rank, name)


def test_every_group_of_ranks_has_a_copy_of_its_own(seen, gathered):
    world, folder = seen
    for size in (1, 2) if world == 4 else (1,):
        for first in range(0, world, size):
            found = whole(folder / "shards" / f"groups_of_{size}", range(first, first + size))
            assert found.keys() == gathered.keys()
            for name, tensor in gathered.items():
                assert torch.equal(found[name], tensor), (size, first, name)
