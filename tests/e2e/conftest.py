import signal
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import yaml

from tests.support.workplace import Workplace, make_workplace
from trainer.run.stop_signal import ASKING


@pytest.fixture(scope="session")
def workplace(tmp_path_factory) -> Workplace:
    """A workplace whose data are prepared."""
    place = make_workplace(tmp_path_factory.mktemp("workplace"))
    done = place.teamlora("prepare", "recipe.yaml")
    assert done.returncode == 0, done.stderr
    return place


@pytest.fixture(autouse=True)
def signals_as_before() -> Iterator[None]:
    """The train command, called in this process, leaves handlers of its own."""
    before = {number: signal.getsignal(number) for number in ASKING}
    yield
    for number, handler in before.items():
        signal.signal(number, handler)


@pytest.fixture
def edited(workplace) -> Callable[..., str]:
    """Writes the recipe with dotted keys changed (None removes one) and returns its name."""

    def edit(**changes: Any) -> str:
        values = yaml.safe_load(workplace.recipe.read_text())
        for dotted, value in changes.items():
            section, name = dotted.split("__")
            values[section][name] = value
        (workplace.folder / "edited.yaml").write_text(yaml.safe_dump(values))
        return "edited.yaml"

    return edit
