"""Mistakes in a set-up, each made on the emulated hosts as on real ones, and what `teamlora check` reports."""

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from importlib.metadata import distribution, version
from pathlib import Path

import yaml

from tests.support.cluster.emulated import ALIAS, Cluster, Host
from tests.support.tiny_models import tiny_llama
from tests.support.workplace import Workplace
from trainer.run.resources import PACKAGE_ROOT

PORT = 29650
MANY = len(os.sched_getaffinity(0)) + 1  # slots, one more than cores
Setup = Callable[[Cluster, Workplace, Path], AbstractContextManager[object]]


@dataclass(frozen=True)
class BadSetup:
    """make: a context in which the hosts have the mistake; its last argument is an empty folder to use.

    host, what, text: of the expected finding, which contains `text`.
    """

    make: Setup
    host: str
    what: str
    text: str
    level: str = "error"
    hostfile: str = "node-a slots=1\nnode-b slots=1\n"
    options: tuple[str, ...] = ()


def _done(host: Host, *command: str) -> None:
    done = host.run(*command)
    if done.returncode != 0:
        raise RuntimeError(f"{host.name}: {' '.join(command)}: {done.stderr.strip()}")


@contextmanager
def _mounted(host: Host, at: Path, *mount: str) -> Iterator[None]:
    _done(host, "mount", *mount, str(at))
    try:
        yield
    finally:
        _done(host, "umount", "--lazy", str(at))


def _emptied(host: Host, folder: Path) -> AbstractContextManager[None]:
    """The host alone sees an empty folder there."""
    return _mounted(host, folder, "-t", "tmpfs", "tmpfs")


def _with_other(host: Host, path: Path, other: Path) -> AbstractContextManager[None]:
    """The host alone sees `other` there, a file or a folder."""
    return _mounted(host, path, "--bind", str(other))


def _nothing(_cluster: Cluster, _place: Workplace, _folder: Path) -> AbstractContextManager[None]:
    return nullcontext()


def _other_package(cluster: Cluster, _place: Workplace, folder: Path) -> AbstractContextManager[None]:
    found = distribution("bitsandbytes")
    metadata = Path(found.locate_file(next(file for file in found.files if file.name == "METADATA")))
    text = metadata.read_text().replace(f"\nVersion: {found.version}\n", "\nVersion: 0.1.0\n", 1)
    return cluster.nodes["node-b"].replaced(metadata, text, folder)


def _other_code(cluster: Cluster, _place: Workplace, folder: Path) -> AbstractContextManager[None]:
    changed = PACKAGE_ROOT / "trainer" / "errors.py"
    return cluster.nodes["node-b"].replaced(changed, changed.read_text() + "\nELSEWHERE = True\n", folder)


def _other_recipe(cluster: Cluster, place: Workplace, folder: Path) -> AbstractContextManager[None]:
    values = yaml.safe_load(place.recipe.read_text())
    values["train"]["learning_rate"] = 2e-3
    return cluster.nodes["node-a"].replaced(place.recipe, yaml.safe_dump(values), folder)


def _other_base(cluster: Cluster, place: Workplace, folder: Path) -> AbstractContextManager[None]:
    other = tiny_llama(folder / "base", seed=1, tie=True) / "model.safetensors"
    return _with_other(cluster.nodes["node-b"], place.folder / "base" / other.name, other)


def _other_prepared(cluster: Cluster, place: Workplace, folder: Path) -> AbstractContextManager[None]:
    other = shutil.copytree(place.folder / "prepared", folder / "prepared")
    manifest = json.loads((other / "manifest.json").read_text())
    (other / "manifest.json").write_text(json.dumps({**manifest, "key": "0" * 64}))  # as from another source
    return _with_other(cluster.nodes["node-b"], place.folder / "prepared", other)


@contextmanager
def _port_taken(cluster: Cluster, _place: Workplace, _folder: Path) -> Iterator[None]:
    listening = f"import socket, time; s = socket.create_server(('', {PORT})); print(flush=True); time.sleep(60)"
    with cluster.nodes["node-a"].begin(sys.executable, "-c", listening, timeout=60) as process:
        process.stdout.readline()
        try:
            yield
        finally:
            cluster.clear()


@contextmanager
def _no_way_back(cluster: Cluster, _place: Workplace, _folder: Path) -> Iterator[None]:
    """node-b does not reach node-a; the launching host reaches both."""
    node = cluster.nodes["node-b"]
    first = node.run("getent", "ahostsv4", "node-a").stdout.split()[0]
    _done(node, "ip", "route", "add", "unreachable", first)
    try:
        yield
    finally:
        _done(node, "ip", "route", "del", "unreachable", first)


def _other_clock(cluster: Cluster, _place: Workplace, folder: Path) -> AbstractContextManager[None]:
    """The kernel's clock is one for all hosts, so the interpreter there reads it 90 s ahead."""
    start = next(Path(entry) for entry in sys.path if entry.endswith("site-packages")) / "distutils-precedence.pth"
    line = (  # it may be run twice
        "import time; time.real = getattr(time, 'real', time.time); "
        "time.time = (lambda real: lambda: real() + 90)(time.real)\n"
    )
    return cluster.nodes["node-b"].replaced(start, start.read_text().rstrip("\n") + "\n" + line, folder)


@contextmanager
def _runs_mounted(cluster: Cluster, place: Workplace, *options: str) -> Iterator[None]:
    runs = place.folder / "runs"
    runs.mkdir(exist_ok=True)
    with _mounted(cluster.nodes["node-a"], runs, "-t", "tmpfs", "-o", *options, "tmpfs"):
        yield


BAD_SETUPS = {
    "unreachable host": BadSetup(
        lambda cluster, _place, _folder: cluster.cut_off("node-b"), "node-b", "reached", "not reached: ssh: connect to"
    ),
    "unknown host": BadSetup(
        _nothing, "node-x", "reached", "Could not resolve hostname", hostfile="node-a slots=1\nnode-x slots=1\n"
    ),
    "same host under two names": BadSetup(
        _nothing,
        ALIAS,
        "machine",
        "is the same machine as node-a: both are node-a",
        hostfile=f"node-a slots=1\n{ALIAS} slots=1\n",
    ),
    "other package version": BadSetup(
        _other_package, "node-b", "packages", f"bitsandbytes is 0.1.0, but {version('bitsandbytes')} on node-a"
    ),
    "other code": BadSetup(_other_code, "node-b", "code", "has other trainer code than "),
    "other recipe": BadSetup(
        _other_recipe, "node-a", "recipe", "has train.learning_rate=0.002, but launcher has 0.001"
    ),
    "other base": BadSetup(
        _other_base, "node-b", "base", "base.model=base differs from that on node-a (compared: configuration, "
    ),
    "missing base": BadSetup(
        lambda cluster, place, _folder: _emptied(cluster.nodes["node-b"], place.folder / "base"),
        "node-b",
        "base",
        "base.model=base is missing, but node-a has it",
    ),
    "empty checkout": BadSetup(
        lambda cluster, _place, _folder: _emptied(cluster.nodes["node-b"], PACKAGE_ROOT),
        "node-b",
        "reached",
        f"no checkout at {PACKAGE_ROOT} (",
    ),
    "missing job folder": BadSetup(
        lambda cluster, place, _folder: _emptied(cluster.nodes["node-b"], place.folder.parent),
        "node-b",
        "folder",
        "No such file or directory",
    ),
    "too many slots": BadSetup(
        _nothing,
        "node-b",
        "slots",
        f"slots={MANY}, but it has ",
        level="warning",
        hostfile=f"node-a slots=1\nnode-b slots={MANY}\n",
        options=(f"train.global_batch_size={MANY + 1}",),
    ),
    "missing venv": BadSetup(
        lambda cluster, _place, _folder: _emptied(cluster.nodes["node-b"], Path(sys.prefix)),
        "node-b",
        "reached",
        f"no interpreter at {sys.executable}",
    ),
    "master port taken": BadSetup(
        _port_taken, "node-a", "port", f"port {PORT} is taken by python", options=("--master-port", str(PORT))
    ),
    "no connection back": BadSetup(_no_way_back, "node-b", "connection", "cannot reach node-a at "),
    "missing prepared set": BadSetup(
        lambda cluster, place, _folder: _emptied(cluster.nodes["node-b"], place.folder / "prepared"),
        "node-b",
        "prepared",
        "data.prepared_dir: no prepared set in prepared",
    ),
    "other prepared set": BadSetup(_other_prepared, "node-b", "prepared", "differs from the set on node-a"),
    "full disk": BadSetup(
        lambda cluster, place, _folder: _runs_mounted(cluster, place, "size=8m"),
        "node-a",
        "run directory",
        "0.01 GiB free at ",
    ),
    "run directory not writable": BadSetup(
        lambda cluster, place, _folder: _runs_mounted(cluster, place, "ro"),
        "node-a",
        "run directory",
        "(Read-only file system)",
    ),
    "too little memory": BadSetup(
        _nothing,
        "node-a",
        "memory",
        "1 rank needs ",
        hostfile="node-a slots=1\n",
        options=("train.micro_batch_size=9000000", "train.global_batch_size=9000000"),
    ),
    "other clock": BadSetup(_other_clock, "node-b", "clock", "its clock is 90 s ahead of", level="warning"),
}


def check_on_hosts(
    cluster: Cluster, place: Workplace, hostfile: str, *options: str
) -> tuple[subprocess.CompletedProcess, float]:
    """`teamlora check --json` on the launching host, and the seconds until it ended."""
    (place.folder / "hosts").write_text(hostfile)
    command = ("teamlora", "check", place.recipe.name, "--hostfile", "hosts", "--json", *options)
    started = time.perf_counter()
    done = cluster.launcher.run(*command, folder=place.folder, env=place.environment(), timeout=300)
    return done, time.perf_counter() - started
