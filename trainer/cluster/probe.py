"""Collects facts about the machine it runs on: `python -m trainer.cluster.probe` answers JSON lines with JSON lines.

Runs on each node before a launch, so it imports nothing that takes seconds. A request is an object with one key, the
name of a function here, and its arguments; the answer has the same key and the function's result.
"""

import csv
import json
import os
import platform
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from shutil import disk_usage
from typing import Any

import psutil

from data_prep.fingerprint import code_hash, file_states, tokenizer_files
from data_prep.resource_limits import available_memory, usable_cpus
from trainer.distributed.deepspeed_file import read_deepspeed_file
from trainer.distributed.network import machine, reached_at
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run.gpu import gpu_files, visible_gpus
from trainer.run.provenance import PACKAGES
from trainer.run.resources import PACKAGE_ROOT, find_deepspeed_config

SAMPLED = 1000  # tensors of the base whose bytes are compared: a few seconds of reads from a slow file system
CONNECT = 3.0  # seconds to reach the first node's port
DRIVER = 6.0  # seconds for nvidia-smi, which wakes the GPUs


@dataclass(frozen=True)
class Request:
    """What to look at. Paths are as given to the launch; relative ones are relative to `folder`.

    port: where this machine shall listen as the first node; 0 for a free port; None for none. environment: variables
    that the ranks there will get.
    """

    folder: str
    recipe: str
    overrides: tuple[str, ...]
    port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """total, free: memory in bytes, None if the driver does not report it. index: nvidia-smi's, None for a MIG part."""

    index: int | None
    name: str
    total: int | None
    free: int | None


@dataclass
class Facts:
    """What one machine is and has. A fact that could not be found out is None; `problems` gives the reason by name."""

    hostname: str
    machine: str  # identifies the machine
    address: str  # where other machines reach it
    python: str
    versions: dict[str, str | None]
    code: str
    cores: int
    memory: int  # available bytes of host memory, within the limits of a container
    gpus: list[Gpu] | None = None
    recipe: dict[str, Any] | None = None  # as resolved
    deepspeed: str | None = None  # sha256 of the file that deepspeed.config names
    base: str | None = None  # one hash of what is compared
    base_in_folder: bool = False  # as opposed to the Hub's cache
    prepared: str | None = None
    run_directory: str | None = None  # the run's directory, or its nearest existing parent
    disk: int | None = None  # free bytes there
    port: int | None = None  # where it listens
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def from_json(cls, answer: dict[str, Any]) -> "Facts":
        """Raises TypeError for an answer with other fields, from other code."""
        gpus = answer.get("gpus")
        return cls(**{**answer, "gpus": gpus and [Gpu(**each) for each in gpus]})


def collect_facts(request: Request) -> Facts:
    """Everything except whether other machines are reachable. Changes to the request's folder for good."""
    facts = Facts(
        hostname=socket.gethostname(),
        machine=machine(),
        address=reached_at(),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        code=code_hash() + code_hash(PACKAGE_ROOT / "trainer"),
        cores=usable_cpus(),
        memory=available_memory(),
    )
    with _record_problem(facts, "gpus"):
        facts.gpus = list_gpus()
    if request.port is not None:
        facts.port = _listen(facts, request.port)
    with _record_problem(facts, "folder"):
        os.chdir(request.folder)
        with _record_problem(facts, "recipe"):
            _add_recipe_facts(facts, load_recipe(Path(request.recipe), request.overrides))
    return facts


def connect(address: str, port: int, hostname: str) -> str | None:
    """Connects to the first node's probe, which sends its hostname. Returns why that failed; None if it worked."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT) as connection:
            answer = connection.makefile().readline().strip()
    except OSError as error:
        return error.strerror or str(error)
    return None if answer == hostname else f"{answer or 'something else'} answers there"


def list_gpus() -> list[Gpu]:
    """The GPUs that ranks will see. Raises OSError if the driver fails or lacks a GPU of CUDA_VISIBLE_DEVICES."""
    visible = visible_gpus()
    if visible == [] or not gpu_files():
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, encoding="utf-8", errors="replace", timeout=DRIVER)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi did not answer in {DRIVER:.0f} s") from None
    if done.returncode != 0:
        raise OSError(f"nvidia-smi: {_last_line(done.stdout + done.stderr)}")
    return parse_gpus(done.stdout, visible)


def parse_gpus(table: str, visible: Sequence[int | str] | None = None) -> list[Gpu]:
    """Parses nvidia-smi's lines `index, uuid, name, MiB, MiB`, where a size may be `[N/A]`.

    visible: the GPUs to return, in this order, named as in CUDA_VISIBLE_DEVICES; None for all. Raises OSError for one
    that is not in the table.
    """
    by_uuid = {}
    for index, uuid, name, *sizes in csv.reader(table.splitlines(), skipinitialspace=True):
        total, free = (int(mib) * 2**20 if mib.isdecimal() else None for mib in sizes)
        by_uuid[uuid] = Gpu(int(index), name, total, free)
    return list(by_uuid.values()) if visible is None else [_find_gpu(name, by_uuid) for name in visible]


def _find_gpu(name: int | str, by_uuid: Mapping[str, Gpu]) -> Gpu:
    """The GPU with this index, or whose uuid begins with this name."""
    if str(name).startswith("MIG-"):
        return Gpu(None, str(name), None, None)
    for uuid, gpu in by_uuid.items():
        if name == gpu.index or (isinstance(name, str) and uuid.startswith(name)):
            return gpu
    raise OSError(f"CUDA_VISIBLE_DEVICES names {name}, but nvidia-smi lists no such GPU")


def _add_recipe_facts(facts: Facts, recipe: Recipe) -> None:
    facts.recipe = recipe.model_dump(mode="json")
    with _record_problem(facts, "deepspeed"):
        read_deepspeed_file(recipe.deepspeed.config)
        facts.deepspeed = sha256(find_deepspeed_config(recipe.deepspeed.config).read_bytes()).hexdigest()
    with _record_problem(facts, "base"):
        facts.base, facts.base_in_folder = _base(recipe)
    with _record_problem(facts, "prepared"):
        facts.prepared = _prepared(recipe)
    with _record_problem(facts, "run_directory"):
        facts.run_directory, facts.disk = _run_directory(recipe.run.directory)


@contextmanager
def _record_problem(facts: Facts, name: str) -> Iterator[None]:
    """Records a failure of the block in facts.problems."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # UserError is a ValueError
        facts.problems[name] = " ".join(str(error).split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _base(recipe: Recipe) -> tuple[str, bool]:
    """(hash of what is compared of the base, whether the recipe names its folder)."""
    from trainer.base.base_fingerprint import fingerprint
    from trainer.base.model_folder import resolve_folder

    folder = resolve_folder(recipe.base)
    states = file_states(tokenizer_files(folder, recipe.data), "base.model")
    tokenizer = [(Path(state["path"]).name, state["sha256"]) for state in states]
    text = fingerprint(folder, SAMPLED) + json.dumps(tokenizer)
    return sha256(text.encode()).hexdigest(), Path(recipe.base.model).expanduser().is_dir()


def _prepared(recipe: Recipe) -> str:
    """Hash of the set's key and the sizes of its files, which are not read."""
    from data_prep.reader import manifest_for

    key, folder = manifest_for(recipe.data)["key"], recipe.data.prepared_dir
    sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in sorted(folder.rglob("*.arrow"))]
    return sha256(json.dumps([key, sizes]).encode()).hexdigest()


def _run_directory(directory: Path) -> tuple[str, int]:
    """The directory or its nearest existing parent, and its free bytes. Raises OSError if it is not writable."""
    directory = directory.resolve()
    existing = next(each for each in (directory, *directory.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=existing):
            return str(existing), disk_usage(existing).free
    except OSError as error:
        raise OSError(f"cannot write into {existing} ({error.strerror})") from error


def _listen(facts: Facts, port: int) -> int:
    """Listens at the port or, if it is taken, at a free one, so that connections can be tried nevertheless."""
    try:
        listener = _server(port)
    except OSError as error:
        facts.problems["port"] = f"port {port} is {_taken_by(port) or error.strerror}"
        listener = _server(0)
    threading.Thread(target=_send_hostname, args=(listener, facts.hostname), daemon=True).start()
    return listener.getsockname()[1]


def _server(port: int) -> socket.socket:
    if socket.has_dualstack_ipv6():
        return socket.create_server(("", port), backlog=1024, family=socket.AF_INET6, dualstack_ipv6=True)
    return socket.create_server(("", port), backlog=1024)


def _send_hostname(listener: socket.socket, hostname: str) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # the other side may be gone
            connection.sendall(f"{hostname}\n".encode())


def _taken_by(port: int) -> str | None:
    """Which process listens there, if this user is allowed to know."""
    listening = (
        c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr and c.laddr.port == port
    )
    connection = next(listening, None)
    if connection is None:
        return None
    pid = connection.pid
    try:
        return f"taken by {psutil.Process(pid).name()}, process {pid}" if pid else "taken"
    except psutil.Error:  # it has ended since
        return "taken"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it failed"])[-1]


def _collect_as_ranks(**arguments: Any) -> dict[str, Any]:
    """Facts as seen with the variables of the ranks, but without downloading a base that is missing."""
    request = Request(**arguments)
    os.environ.update(request.environment | {"HF_HUB_OFFLINE": "1"})
    return asdict(collect_facts(request))


_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "facts": _collect_as_ranks,
    "clock": time.time,
    "connect": connect,
}


def main() -> None:
    """Answers each line of stdin with a line on stdout, until stdin ends."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            ((name, arguments),) = json.loads(line).items()
            print(json.dumps({name: _FUNCTIONS[name](**arguments)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
