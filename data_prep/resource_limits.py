"""Memory and CPUs that this process may use: the machine's, or less where a container, Slurm or systemd limits them.

A control group (cgroup) and each one around it may set a limit; the least room counts. Version 2 has one hierarchy of
groups below /sys/fs/cgroup, version 1 has one per controller.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import psutil

_MACHINE = Path("/")


def available_memory(machine: Path = _MACHINE) -> int:
    """Bytes of host memory that can still be taken without swapping, or being killed at a limit.

    What a group uses of its limit includes files that the system keeps in memory and gives up when asked; they do not
    count. machine: the folder that holds proc and sys.
    """
    rooms = [psutil.virtual_memory().available]
    for group in _groups(machine, "memory"):
        used = _number(group, "memory.current", "memory.usage_in_bytes") or 0
        taken = max(used - _cached_files(group), 0)
        limits = (_number(group, name) for name in ("memory.max", "memory.high", "memory.limit_in_bytes"))
        rooms += [max(limit - taken, 0) for limit in limits if limit is not None]
    return min(rooms)


def oom_kills(machine: Path = _MACHINE) -> int:
    """Processes of this process's group that the system has killed for their memory; 0 where it does not count them.

    It counts them where they were, whether the machine ran out of memory, or a group around them. Groups inside this
    one count in version 2 only. machine: as above.
    """
    for group in _groups(machine, "memory"):
        if lines := _text(group / "memory.events") or _text(group / "memory.oom_control"):
            return int(dict(line.split() for line in lines.splitlines()).get("oom_kill", 0))
    return 0


def usable_cpus(machine: Path = _MACHINE) -> int:
    """CPUs that can be busy at once, at least 1; a part of one counts as one. machine: as above."""
    counts = [len(os.sched_getaffinity(0))]
    for group in _groups(machine, "cpu"):
        quota, _, period = _text(group / "cpu.max").partition(" ")  # microseconds of CPU time per microseconds
        if not quota:
            quota, period = _text(group / "cpu.cfs_quota_us"), _text(group / "cpu.cfs_period_us")
        if quota.isdecimal() and period.isdecimal():  # without a limit it is `max`, or -1
            counts.append(max(-(-int(quota) // max(int(period), 1)), 1))
    return min(counts)


def _groups(machine: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's groups, and of those around them, that may limit what `controller` controls.

    In a container the path in proc may be the host's, which is not there; its own group is then the top folder.
    """
    mounted = machine / "sys" / "fs" / "cgroup"
    for line in (_text(machine / "proc" / "self" / "cgroup") or "0::/").splitlines():
        _, controllers, path = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        top = mounted / controllers if (mounted / controllers).is_dir() else mounted / controller
        own = top / path.lstrip("/")
        yield from (group for group in (own, *own.parents) if group.is_relative_to(top))


def _cached_files(group: Path) -> int:
    """Bytes, those of groups inside it included: `total_` in version 1."""
    fields = dict(line.split() for line in _text(group / "memory.stat").splitlines())
    return sum(int(fields.get(f"total_{name}", fields.get(name, 0))) for name in ("active_file", "inactive_file"))


def _number(group: Path, *names: str) -> int | None:
    """From the first of these files that holds one; None without a limit, which is the text `max`."""
    return next((int(text) for text in (_text(group / name) for name in names) if text.isdecimal()), None)


def _text(path: Path) -> str:
    """Empty where there is no such file, as in the top group, or none that can be read."""
    try:
        return path.read_text(encoding="utf-8").strip()
    except OSError:
        return ""
