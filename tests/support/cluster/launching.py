"""A prepared workplace that all emulated hosts see, and launches of its recipe on them."""

import itertools
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil

from tests.support.cluster.emulated import Cluster, ended
from tests.support.workplace import REPOSITORY, SCRIPT, ZERO3, Workplace, make_workplace
from trainer.distributed.network import free_port

LIMIT = 480  # seconds
PORTS = itertools.count(29700)  # a port of its own for each launch: ranks left behind would meet the next at theirs
PASSED_ON = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
    "TORCHDYNAMO_DISABLE": "1",
}


def prepared_workplace(folder: Path) -> Workplace:
    """One with its data prepared, and the variables that DeepSpeed's launcher is to pass on."""
    place = make_workplace(folder)
    (folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in PASSED_ON.items()))
    done = place.teamlora("prepare", "recipe.yaml")
    assert done.returncode == 0, done.stdout + done.stderr
    return place


def on_one_host(place: Workplace, **overrides: object) -> None:
    """Two ranks on this machine itself, under DeepSpeed's launcher: what runs on two hosts are compared with."""
    launcher = ["deepspeed", "--num_gpus", "2", "--master_port", str(free_port())]
    done = place.run(*launcher, SCRIPT, "recipe.yaml", ZERO3, *_as_arguments(overrides))
    assert done.returncode == 0, done.stdout + done.stderr


def _as_arguments(overrides: Mapping[str, object]) -> list[str]:
    """run__name=first -> run.name=first"""
    return [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]


@dataclass(frozen=True)
class Train:
    """Launches a rank of the workplace's recipe on each of some nodes; no nodes: by a hostfile that is missing."""

    cluster: Cluster
    place: Workplace

    def begin(self, *nodes: str, **overrides: object) -> subprocess.Popen:
        """Starts a launch by DeepSpeed's launcher with these values of the recipe: run__name is run.name."""
        options = ["--hostfile", self._hostfile(nodes), "--master_port", str(next(PORTS))]
        return self._begin(["deepspeed", *options, SCRIPT], overrides)

    def begin_supervised(self, *nodes: str, options: Sequence[str] = (), **overrides: object) -> subprocess.Popen:
        """The same by `bash launch/train.sh` with options of its own."""
        return self._begin(["bash", SCRIPT, f"hostfile={self._hostfile(nodes)}", *options], overrides)

    def __call__(self, *nodes: str, **overrides: object) -> subprocess.CompletedProcess:
        """A launch by DeepSpeed's launcher to its end."""
        return ended(self.begin(*nodes, **overrides))

    def metrics(self, run: str) -> Path:
        """Where the run tells its steps."""
        return self.place.folder / "runs" / run / "metrics.jsonl"

    def supervisor(self) -> psutil.Process:
        """That of the one supervised launch which runs."""
        launch = [str(REPOSITORY / "trainer" / "__main__.py"), "launch"]
        (found,) = [process for process in self.cluster.launcher.processes() if process.cmdline()[1:3] == launch]
        return found

    def _hostfile(self, nodes: Sequence[str]) -> str:
        hostfile = self.place.folder / "hostfile"
        hostfile.unlink(missing_ok=True)
        if nodes:
            hostfile.write_text("".join(f"{node} slots=1\n" for node in nodes))
        return hostfile.name

    def _begin(self, command: Sequence[str], overrides: Mapping[str, object]) -> subprocess.Popen:
        return self.cluster.launcher.begin(
            *command, "recipe.yaml", ZERO3, *_as_arguments(overrides),
            folder=self.place.folder, env=self.place.environment(), timeout=LIMIT,
        )  # fmt: skip


@contextmanager
def unable_to_meet(cluster: Cluster) -> Iterator[None]:
    """node-b does not reach node-a, and the launching host reaches both."""
    way = ["route", "add", "unreachable", "198.51.100.2"]
    cluster.nodes["node-b"].run("ip", *way)
    try:
        yield
    finally:
        cluster.nodes["node-b"].run("ip", way[0], "del", *way[2:])
