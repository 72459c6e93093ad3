from collections.abc import Callable
from pathlib import Path

import pytest

from trainer.recipe import BaseModelConfig


@pytest.fixture
def base_of() -> Callable[..., BaseModelConfig]:
    """Make the recipe's base section for a folder; fp32 and unquantised unless told otherwise."""

    def make(folder: Path, **keys: object) -> BaseModelConfig:
        return BaseModelConfig(**{"model": str(folder), "quantization": "none", "dtype": "fp32", **keys})

    return make
