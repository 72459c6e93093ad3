"""Memory and CPUs within control groups, of made-up machines with 100 GiB free and 16 CPUs."""

import os
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest

from data_prep.resource_limits import available_memory, oom_kills, usable_cpus

GIB = 2**30
NONE = "9223372036854771712"  # version 1 writes this for no limit


@pytest.fixture(autouse=True)
def machine(monkeypatch):
    monkeypatch.setattr(psutil, "virtual_memory", lambda: SimpleNamespace(available=100 * GIB))
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)))


def write(machine: Path, files: dict[str, object]) -> Path:
    for name, text in files.items():
        path = machine / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{text}\n")
    return machine


V2 = {"proc/self/cgroup": "0::/slurm/job_7/task"}
V1 = {"proc/self/cgroup": "5:cpu,cpuacct:/docker/ab12\n4:memory:/docker/ab12\n1:name=systemd:/\n0::/"}
GROUP = "sys/fs/cgroup"


@pytest.mark.parametrize(
    ("files", "free"),
    [
        ({}, 100),
        ({f"{GROUP}/memory.max": "max", f"{GROUP}/memory.current": GIB}, 100),
        ({f"{GROUP}/memory.max": 4 * GIB, f"{GROUP}/memory.current": GIB}, 3),
        ({f"{GROUP}/memory.max": 400 * GIB, f"{GROUP}/memory.current": GIB}, 100),
        ({f"{GROUP}/memory.max": 4 * GIB, f"{GROUP}/memory.current": 5 * GIB}, 0),
        # the job has less room than its task
        (V2 | {f"{GROUP}/slurm/job_7/memory.max": 8 * GIB, f"{GROUP}/slurm/job_7/memory.current": 2 * GIB,
               f"{GROUP}/slurm/job_7/task/memory.max": 7 * GIB, f"{GROUP}/slurm/job_7/task/memory.current": 0}, 6),
        (V2 | {f"{GROUP}/slurm/memory.max": "max", f"{GROUP}/slurm/job_7/memory.high": 5 * GIB}, 5),
        # files in memory are given up when it is needed
        ({f"{GROUP}/memory.max": 4 * GIB, f"{GROUP}/memory.current": 3 * GIB,
          f"{GROUP}/memory.stat": f"anon {GIB}\nactive_file {GIB // 2}\ninactive_file {GIB}"}, 2.5),
        (V1 | {f"{GROUP}/memory/memory.limit_in_bytes": NONE,
               f"{GROUP}/memory/docker/ab12/memory.limit_in_bytes": 4 * GIB,
               f"{GROUP}/memory/docker/ab12/memory.usage_in_bytes": GIB}, 3),
        (V1 | {f"{GROUP}/memory/docker/ab12/memory.limit_in_bytes": NONE}, 100),
        # inside a container the path is the host's
        (V1 | {f"{GROUP}/memory/memory.limit_in_bytes": 6 * GIB, f"{GROUP}/memory/memory.usage_in_bytes": 3 * GIB,
               f"{GROUP}/memory/memory.stat": f"inactive_file 0\ntotal_inactive_file {GIB}"}, 4),
    ],
)  # fmt: skip
def test_free_memory_is_the_least_room_of_the_host_and_of_each_group(tmp_path, files, free):
    assert available_memory(write(tmp_path, files)) == free * GIB


@pytest.mark.parametrize(
    ("files", "kills"),
    [
        ({}, 0),
        ({f"{GROUP}/memory.events": "low 0\nhigh 7\nmax 9\noom 3\noom_kill 2\noom_group_kill 0"}, 2),
        (
            V2
            | {f"{GROUP}/slurm/memory.events": "oom_kill 5", f"{GROUP}/slurm/job_7/task/memory.events": "oom_kill 1"},
            1,
        ),
        (V1 | {f"{GROUP}/memory/docker/ab12/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 4"}, 4),
        (V1 | {f"{GROUP}/memory/memory.oom_control": "oom_kill_disable 0\nunder_oom 0\noom_kill 6"}, 6),
        (V1 | {f"{GROUP}/memory/docker/ab12/memory.oom_control": "oom_kill_disable 0\nunder_oom 0"}, 0),  # before 4.13
    ],
)
def test_kills_for_memory_are_those_that_the_own_group_counts(tmp_path, files, kills):
    assert oom_kills(write(tmp_path, files)) == kills


@pytest.mark.parametrize(
    ("files", "cpus"),
    [
        ({}, 16),
        ({f"{GROUP}/cpu.max": "max 100000"}, 16),
        ({f"{GROUP}/cpu.max": "400000 100000"}, 4),
        ({f"{GROUP}/cpu.max": "250000 100000"}, 3),
        ({f"{GROUP}/cpu.max": "10000 100000"}, 1),
        ({f"{GROUP}/cpu.max": "6400000 100000"}, 16),
        (V2 | {f"{GROUP}/slurm/job_7/cpu.max": "200000 100000", f"{GROUP}/slurm/job_7/task/cpu.max": "max 100000"}, 2),
        (V1 | {f"{GROUP}/cpu,cpuacct/docker/ab12/cpu.cfs_quota_us": 300000,
               f"{GROUP}/cpu,cpuacct/docker/ab12/cpu.cfs_period_us": 100000}, 3),
        (V1 | {f"{GROUP}/cpu/cpu.cfs_quota_us": 50000, f"{GROUP}/cpu/cpu.cfs_period_us": 25000}, 2),
        (V1 | {f"{GROUP}/cpu/cpu.cfs_quota_us": -1, f"{GROUP}/cpu/cpu.cfs_period_us": 100000}, 16),
    ],
)  # fmt: skip
def test_cpus_are_the_fewest_of_affinity_and_each_group(tmp_path, files, cpus):
    assert usable_cpus(write(tmp_path, files)) == cpus


def test_this_machines_numbers_are_those_of_its_system_or_less():
    assert 0 < available_memory() <= 100 * GIB
    assert 1 <= usable_cpus() <= 16
