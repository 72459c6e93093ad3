"""Control groups that hold processes to a share of a core. Need root."""

import contextlib
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

GROUPS = Path("/sys/fs/cgroup")
PERIOD = 100_000  # microseconds


@contextlib.contextmanager
def cpu_groups(count: int, cores: float) -> Iterator[list[list[str]]]:
    """For each of `count` groups, words before a command, which hold it and its children to so many cores.

    Raises OSError where the kernel, or a container around this process, has no such groups.
    """
    old = (GROUPS / "cpu").is_dir()
    parent = GROUPS / "cpu" if old else GROUPS
    folders = [parent / f"benchmark-{uuid.uuid4().hex[:8]}" for _ in range(count)]
    quota = round(cores * PERIOD)
    try:
        for folder in folders:
            folder.mkdir()
            if old:
                (folder / "cpu.cfs_period_us").write_text(str(PERIOD))
                (folder / "cpu.cfs_quota_us").write_text(str(quota))
            else:
                (folder / "cpu.max").write_text(f"{quota} {PERIOD}")
        yield [["sh", "-c", f'echo $$ > {folder}/cgroup.procs && exec "$@"', "sh"] for folder in folders]
    finally:
        for folder in folders:
            subprocess.run(["rmdir", folder], check=False, capture_output=True)
