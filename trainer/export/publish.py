"""A folder that is there whole or not at all."""

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from data_prep.errors import UserError


@contextmanager
def publishing(folder: Path) -> Iterator[Path]:
    """Gives an empty folder beside `folder` that is renamed to it when the block ends without an error.

    Raises UserError where the disk refuses. `folder` must not exist.
    """
    staging = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    try:
        staging.mkdir(parents=True)
        yield staging
        for path in [*staging.rglob("*"), staging]:
            handle = os.open(path, os.O_RDONLY)
            os.fsync(handle)
            os.close(handle)
        staging.rename(folder)
    except OSError as error:
        raise UserError(
            f"--output: cannot write {folder} ({error.strerror or error}); give a folder that can be written"
        ) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
