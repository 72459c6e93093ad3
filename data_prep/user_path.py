"""Paths as users write them: `~` is their home folder, in a recipe and on the command line, where no shell sees it."""

import os
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator


def expand_home(path: Path) -> Path:
    """The path with a leading ~ or ~user replaced; as given where there is no such home."""
    return Path(os.path.expanduser(path))


def is_file_name(name: object) -> bool:
    """Whether an index may name a file of its own folder so: no path that leads elsewhere."""
    return isinstance(name, str) and name == os.path.basename(name) and name not in ("", ".", "..")


def _refuse_no_path(path: Path | str) -> Path | str:
    """Raises ValueError for what no file can be named: a zero byte, half a character."""
    text = str(path)
    try:
        if "\0" not in text and os.fsencode(text):
            return path
    except UnicodeEncodeError:
        pass
    raise ValueError(f"{text!r} cannot be the name of a file or folder; change it")


_check = AfterValidator(_refuse_no_path)
UserPath = Annotated[Path, _check, AfterValidator(expand_home)]
# Text that may be a path: a model id or a word such as `auto` never begins with ~.
UserPathOrName = Annotated[str, _check, AfterValidator(os.path.expanduser)]
