"""Two ranks on one card, over gloo, in fp32: streams, gathers of bytes and placed experts. NCCL stays unproven."""

import json

import pytest

from tests.support import scene
from tests.support.ranks import run_ranks


@pytest.fixture(scope="module")
def losses_of(tmp_path_factory):
    """Trains on so many ranks, with experts placed over so many; the losses of its steps."""
    folder = tmp_path_factory.mktemp("two-ranks")
    base = scene.make_base(folder / "base")

    def losses_of(world: int, parallel_size: int = 1) -> list[float]:
        output = folder / f"{world}-{parallel_size}.json"
        arguments = ["-m", "tests.gpu.two_ranks", str(base), str(output), str(parallel_size)]
        run_ranks(world, arguments, limit=300, environment={"CUDA_VISIBLE_DEVICES": "0"})
        return json.loads(output.read_text())

    return losses_of


@pytest.mark.parametrize("parallel_size", [1, 2], ids=["plain", "placed"])
def test_losses_are_those_of_one_rank(losses_of, parallel_size):
    assert losses_of(2, parallel_size) == pytest.approx(losses_of(1), rel=1e-5)
