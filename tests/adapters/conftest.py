from pathlib import Path

import pytest

from tests.support.tiny_models import tiny_llama


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> Path:
    """The folder of a bf16 tiny llama that tests only read."""
    return tiny_llama(tmp_path_factory.mktemp("llama"))
