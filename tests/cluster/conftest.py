import itertools
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import pytest

from tests.cluster.emulated import Cluster, emulated, ended, why_not
from tests.e2e.conftest import Workplace, make_workplace
from tests.e2e.test_run import SCRIPT, ZERO3

LIMIT = 180  # seconds
PORTS = itertools.count(29900)  # a port of its own for each launch: ranks left behind would meet the next at theirs
PASSED_ON = {
    "GLOO_SOCKET_IFNAME": "eth0",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "TOKENIZERS_PARALLELISM": "false",
}


@pytest.fixture(scope="session")
def can_emulate() -> None:
    """Skips where this machine cannot emulate hosts, and says why."""
    reason = why_not()
    if reason is not None:
        pytest.skip(reason)


@pytest.fixture(scope="session")
def shared(can_emulate, tmp_path_factory) -> Workplace:
    """A prepared workplace that all hosts see, with a run of two ranks on one host, named "one_host"."""
    place = make_workplace(tmp_path_factory.mktemp("shared"))
    (place.folder / ".deepspeed_env").write_text("".join(f"{name}={value}\n" for name, value in PASSED_ON.items()))
    alone = ["deepspeed", "--num_gpus", "2", "--master_port", str(next(PORTS)), SCRIPT]
    for command in (["teamlora", "prepare", "recipe.yaml"], [*alone, "recipe.yaml", ZERO3, "run.name=one_host"]):
        done = place.run(*command)
        assert done.returncode == 0, done.stdout + done.stderr
    return place


@pytest.fixture(scope="session")
def hosts(can_emulate, tmp_path_factory) -> Iterator[Cluster]:
    """One launching host and two nodes for all tests."""
    with emulated(tmp_path_factory.mktemp("hosts")) as cluster:
        yield cluster


@pytest.fixture
def cluster(hosts) -> Iterator[Cluster]:
    """The hosts with nothing running on them, whatever a test leaves."""
    yield hosts
    hosts.clear()


@dataclass(frozen=True)
class Train:
    """Launches a rank of the workplace's recipe on each of some nodes; no nodes: by a hostfile that is missing."""

    cluster: Cluster
    place: Workplace

    def begin(self, *nodes: str, **overrides: object) -> subprocess.Popen:
        """Starts a launch by DeepSpeed's launcher with these values of the recipe: run__name is run.name."""
        options = ["--hostfile", self._hostfile(nodes), "--master_port", str(next(PORTS))]
        return self._on_launcher("deepspeed", *options, SCRIPT, overrides)

    def begin_supervised(self, *nodes: str, options: Sequence[str] = (), **overrides: object) -> subprocess.Popen:
        """The same by `bash launch/train.sh` with options of its own."""
        return self._on_launcher("bash", SCRIPT, f"hostfile={self._hostfile(nodes)}", *options, overrides)

    def _hostfile(self, nodes: Sequence[str]) -> str:
        hostfile = self.place.folder / "hostfile"
        hostfile.unlink(missing_ok=True)
        if nodes:
            hostfile.write_text("".join(f"{node} slots=1\n" for node in nodes))
        return hostfile.name

    def _on_launcher(self, *command: str | Mapping[str, object]) -> subprocess.Popen:
        *words, overrides = command
        values = [f"{key.replace('__', '.')}={value}" for key, value in overrides.items()]
        return self.cluster.launcher.begin(
            *words, "recipe.yaml", ZERO3, *values,
            folder=self.place.folder, env=self.place.environment(), timeout=LIMIT,
        )  # fmt: skip

    def __call__(self, *nodes: str, **overrides: object) -> subprocess.CompletedProcess:
        """A launch to its end."""
        return ended(self.begin(*nodes, **overrides))


@pytest.fixture
def train(cluster, shared) -> Train:
    return Train(cluster, shared)
