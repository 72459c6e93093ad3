"""Paths as users write them: `~` is their home folder, in a recipe and on the command line, where no shell sees it."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand_home(path: Path) -> Path:
    """The path with a leading ~ or ~user replaced; as given where there is no such home."""
    return Path(os.path.expanduser(path))


UserPath = Annotated[Path, AfterValidator(expand_home)]
# Text that may be a path: a model id or a word such as `auto` never begins with ~.
UserPathOrName = Annotated[str, AfterValidator(os.path.expanduser)]
