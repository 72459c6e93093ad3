from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.support import scene
from trainer.recipe import Recipe

CONFIGS = Path(__file__).parent / "configs"


@pytest.fixture
def recipe_of() -> Callable[..., Recipe]:
    """A recipe in bf16 on a folder of tests/estimate/configs, which holds config.json alone."""

    def make(name: str, **changes: Any) -> Recipe:
        return scene.recipe(CONFIGS / name, **{"base__dtype": "bf16", "data__seq_len": 512, **changes})

    return make
