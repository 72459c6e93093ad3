"""A home folder for users without one, as in containers that run under any user id (`docker run --user 12345`)."""

import os
import tempfile
from pathlib import Path


def ensure_home() -> None:
    """Sets HOME to a folder for temporary files where the user's home is unknown or closed to them.

    Path.home() would raise, and libraries would fail, or put their caches into a folder named `~` of the current one.
    Call it before they are imported. Ranks and probes inherit the variable.
    """
    if not _is_usable(Path(os.path.expanduser("~"))):
        os.environ["HOME"] = str(_temporary_home())


def _is_usable(home: Path) -> bool:
    """Whether caches can be written there, or, in a home that can only be read, are there already."""
    if not home.is_absolute():  # `~` itself: neither HOME nor the list of users says where it is
        return False
    nearest = next(str(folder) for folder in (home, *home.parents) if os.path.isdir(folder))
    return os.access(nearest, os.W_OK) or os.path.isdir(home / ".cache")


def _temporary_home() -> Path:
    """The same folder for each command of a user, so that what one has downloaded the next one finds."""
    home = Path(tempfile.gettempdir(), f"teamlora-home-{os.getuid()}")
    home.mkdir(mode=0o700, exist_ok=True)
    return home if home.stat().st_uid == os.getuid() else Path(tempfile.mkdtemp(prefix=f"{home.name}-"))
