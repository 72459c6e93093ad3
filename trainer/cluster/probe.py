"""What a machine tells of itself: `python -m trainer.cluster.probe` answers lines of JSON with lines of JSON.

Runs on each node before a launch, so it imports nothing that takes seconds. A request is an object with one key; the
answer is what the function of that name here returns.
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
from trainer.cluster.local_ranks import visible_gpus
from trainer.cluster.ssh import REPOSITORY
from trainer.distributed.network import machine, reached_at
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run.provenance import PACKAGES
from trainer.run.resources import find_deepspeed_config

SAMPLED = 1000  # tensors of the base whose bytes are compared: a few seconds of reads from a slow file system
CONNECT = 3.0  # seconds to reach the first node's port
DRIVER = 6.0  # seconds for nvidia-smi, which wakes the GPUs


@dataclass(frozen=True)
class Request:
    """What a machine is to look at. Paths are those of the launch, and relative ones are seen from `folder`.

    port: where the first node is to listen; 0 for a free one; None: it does not. environment: variables that the ranks
    there will be given.
    """

    folder: str
    recipe: str
    overrides: tuple[str, ...]
    port: int | None = None
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Gpu:
    """Its memory in bytes; None where the driver does not tell it. index: nvidia-smi's; None for a part (MIG)."""

    index: int | None
    name: str
    total: int | None
    free: int | None


@dataclass
class Facts:
    """What one machine is and has. What could not be found out is None, and told in `problems` by the field's name."""

    hostname: str
    machine: str  # the same text on the same machine only
    address: str  # at which other machines reach it
    python: str
    versions: dict[str, str | None]
    code: str
    cores: int
    memory: int  # bytes of the host's that are available
    gpus: list[Gpu] | None = None
    recipe: dict[str, Any] | None = None  # as resolved
    deepspeed: str | None = None  # sha256 of the file that deepspeed.config names
    base: str | None = None  # what was compared of it, as one hash
    base_in_folder: bool = False  # and not in the Hub's cache
    prepared: str | None = None
    run_directory: str | None = None  # the run's directory, or the nearest folder above that is there
    disk: int | None = None  # bytes that are free there
    port: int | None = None  # at which it listens
    problems: dict[str, str] = field(default_factory=dict)

    @classmethod
    def read(cls, answer: dict[str, Any]) -> "Facts":
        """From JSON. Raises TypeError for an answer of other code."""
        gpus = answer.get("gpus")
        return cls(**{**answer, "gpus": gpus and [Gpu(**each) for each in gpus]})


def facts(request: Request) -> Facts:
    """Everything but whether others are reached."""
    found = Facts(
        hostname=socket.gethostname(),
        machine=machine(),
        address=reached_at(),
        python=platform.python_version(),
        versions={name: _version(name) for name in PACKAGES},
        code=code_hash() + code_hash(REPOSITORY / "trainer"),
        cores=len(os.sched_getaffinity(0)),
        memory=psutil.virtual_memory().available,
    )
    with _told(found, "gpus"):
        found.gpus = gpus()
    if request.port is not None:
        found.port = _listen_somewhere(found, request.port)
    with _told(found, "folder"):
        os.chdir(request.folder)
        with _told(found, "recipe"):
            _look_at_recipe(found, load_recipe(Path(request.recipe), request.overrides))
    return found


def connect(address: str, port: int, hostname: str) -> str | None:
    """Why this machine does not reach the probe of the first node, which says its name; None where it does."""
    try:
        with socket.create_connection((address, port), timeout=CONNECT) as connection:
            told = connection.makefile().readline().strip()
    except OSError as error:
        return error.strerror or str(error)
    return None if told == hostname else f"{told or 'something else'} answers there"


def gpus() -> list[Gpu]:
    """Those that ranks will see. Raises OSError where there are some and the driver does not work, or has not all."""
    visible = visible_gpus()
    if visible == [] or not any(Path("/dev").glob("nvidia[0-9]*")):
        return []
    command = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total,memory.free", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=DRIVER)
    except subprocess.TimeoutExpired:
        raise OSError(f"nvidia-smi does not answer in {DRIVER:.0f} s") from None
    if done.returncode != 0:
        raise OSError(f"nvidia-smi: {_last_line(done.stdout + done.stderr)}")
    return gpus_in(done.stdout, visible)


def gpus_in(table: str, visible: Sequence[int | str] | None = None) -> list[Gpu]:
    """From nvidia-smi's lines `index, uuid, name, MiB, MiB`, where a size may be `[N/A]`.

    visible: as CUDA_VISIBLE_DEVICES names those to give, in its order; None: all. Raises OSError for one that is not
    there.
    """
    found = {}
    for index, uuid, name, *sizes in csv.reader(table.splitlines(), skipinitialspace=True):
        found[uuid] = Gpu(int(index), name, *(int(mib) * 2**20 if mib.isdecimal() else None for mib in sizes))
    return list(found.values()) if visible is None else [_named(wanted, found) for wanted in visible]


def _named(wanted: int | str, gpus: Mapping[str, Gpu]) -> Gpu:
    """The one of that number, or of the uuid (a key) that begins so."""
    if str(wanted).startswith("MIG-"):
        return Gpu(None, str(wanted), None, None)
    for uuid, gpu in gpus.items():
        if wanted == gpu.index or (isinstance(wanted, str) and uuid.startswith(wanted)):
            return gpu
    raise OSError(f"CUDA_VISIBLE_DEVICES names {wanted}, and nvidia-smi shows no such GPU")


def _look_at_recipe(found: Facts, recipe: Recipe) -> None:
    found.recipe = recipe.model_dump(mode="json")
    with _told(found, "deepspeed"):
        found.deepspeed = sha256(find_deepspeed_config(recipe.deepspeed.config).read_bytes()).hexdigest()
    with _told(found, "base"):
        found.base, found.base_in_folder = _base(recipe)
    with _told(found, "prepared"):
        found.prepared = _prepared(recipe)
    with _told(found, "run_directory"):
        found.run_directory, found.disk = _run_directory(recipe.run.directory)


@contextmanager
def _told(found: Facts, name: str) -> Iterator[None]:
    """A failure of the block becomes one of the problems."""
    try:
        yield
    except (OSError, ValueError, KeyError) as error:  # UserError is a ValueError
        found.problems[name] = " ".join(str(error).split())


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _base(recipe: Recipe) -> tuple[str, bool]:
    from trainer.base.base_fingerprint import fingerprint
    from trainer.base.model_folder import resolve_folder

    folder = resolve_folder(recipe.base)
    states = file_states(tokenizer_files(folder, recipe.data), "base.model")
    tokenizer = [(Path(state["path"]).name, state["sha256"]) for state in states]
    text = fingerprint(folder, SAMPLED) + json.dumps(tokenizer)
    return sha256(text.encode()).hexdigest(), Path(recipe.base.model).expanduser().is_dir()


def _prepared(recipe: Recipe) -> str:
    """The key of the set and the bytes of its files, which are not read."""
    from data_prep.reader import manifest_for

    key, folder = manifest_for(recipe.data)["key"], recipe.data.prepared_dir
    sizes = [(str(path.relative_to(folder)), path.stat().st_size) for path in sorted(folder.rglob("*.arrow"))]
    return sha256(json.dumps([key, sizes]).encode()).hexdigest()


def _run_directory(directory: Path) -> tuple[str, int]:
    """The nearest folder that is there, in which a file could be written, and bytes free. Raises OSError if not."""
    directory = directory.resolve()
    there = next(each for each in (directory, *directory.parents) if each.exists())
    try:
        with tempfile.TemporaryFile(dir=there):
            return str(there), disk_usage(there).free
    except OSError as error:
        raise OSError(f"cannot write into {there} ({error.strerror})") from error


def _listen_somewhere(found: Facts, port: int) -> int:
    """Listens at the port, or, where it is taken, at another: so that connections can be tried all the same."""
    both = {"family": socket.AF_INET6, "dualstack_ipv6": True} if socket.has_dualstack_ipv6() else {}
    try:
        listener = socket.create_server(("", port), backlog=1024, **both)
    except OSError as error:
        found.problems["port"] = f"port {port} is {_taken_by(port) or error.strerror}"
        listener = socket.create_server(("", 0), backlog=1024, **both)
    threading.Thread(target=_answer, args=(listener, found.hostname), daemon=True).start()
    return listener.getsockname()[1]


def _answer(listener: socket.socket, hostname: str) -> None:
    while True:
        connection, _ = listener.accept()
        with connection, suppress(OSError):  # who asked may be gone
            connection.sendall(f"{hostname}\n".encode())


def _taken_by(port: int) -> str | None:
    """Which process listens there, if this user may know."""
    listening = (c for c in psutil.net_connections("tcp") if c.status == psutil.CONN_LISTEN and c.laddr.port == port)
    found = next(listening, None)
    if found is None:
        return None
    try:
        return f"taken by {psutil.Process(found.pid).name()}, process {found.pid}" if found.pid else "taken"
    except psutil.Error:  # it has ended since
        return "taken"


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["it failed"])[-1]


def _as_ranks_see(**request: Any) -> dict[str, Any]:
    asked = Request(**request)
    os.environ.update(asked.environment | {"HF_HUB_OFFLINE": "1"})  # a base that is not there is not fetched now
    return asdict(facts(asked))


_ANSWERS: dict[str, Callable[..., Any]] = {
    "facts": _as_ranks_see,
    "clock": time.time,
    "connect": connect,
}


def main() -> None:
    """Answers each line of stdin with one of stdout, until stdin ends."""
    answers = sys.stdout
    with redirect_stdout(sys.stderr):
        for line in sys.stdin:
            ((name, arguments),) = json.loads(line).items()
            print(json.dumps({name: _ANSWERS[name](**arguments)}), file=answers, flush=True)


if __name__ == "__main__":
    main()
