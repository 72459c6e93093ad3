"""Slurm on the emulated hosts: its controller on the launching host, a daemon on each node. All end with the hosts."""

import os
import shutil
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from tests.support.cluster.emulated import NODES, SYSTEM_PATH, Cluster, emulated
from tests.support.workplace import REPOSITORY, ZERO3, Workplace, wait_for_steps

SBATCH = str(REPOSITORY / "launch" / "slurm.sbatch")
PROGRAMS = ("munged", "slurmctld", "slurmd", "sbatch", "srun", "scancel", "scontrol")
PACKAGES = "slurm-wlm munge"
ENDED = {"COMPLETED", "FAILED", "CANCELLED", "TIMEOUT", "NODE_FAIL"}
LIMIT = 600  # seconds
# No cgroups, which namespaces may not offer. A requeued job waits for cred_expire seconds, and for the next schedule.
SETTINGS = f"""ClusterName=emulated
SlurmctldHost=launcher
SlurmUser=root
AuthType=auth/munge
AuthInfo=cred_expire=5
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
ReturnToService=2
SlurmdParameters=config_overrides
SchedulerType=sched/builtin
SchedulerParameters=sched_interval=1
OverTimeLimit=1
StateSaveLocation={{folder}}/state
SlurmdSpoolDir={{folder}}/spool-%n
SlurmctldPidFile=/run/slurmctld.pid
SlurmdPidFile=/run/slurmd.pid
SlurmctldLogFile={{folder}}/slurmctld.log
SlurmdLogFile={{folder}}/slurmd-%n.log
MailProg=/bin/true
NodeName={",".join(NODES)} CPUs=2
PartitionName=all Nodes=ALL Default=YES State=UP
"""
MUNGED = """mkdir /run/munge
munged --force --key-file="$1/munge.key" --log-file="$1/munged-$(hostname).log" \
    --pid-file=/run/munge/pid --seed-file=/run/munge/seed
"""


def why_not() -> str | None:
    """Why there can be no Slurm on emulated hosts, or None where there can."""
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    return f"needs {', '.join(absent)} (Debian packages {PACKAGES})" if absent else None


@dataclass(frozen=True)
class Slurm:
    """A queue with two nodes. Commands run on the launching host, in the workplace."""

    cluster: Cluster
    place: Workplace
    environment: dict[str, str]

    def run(self, *command: str, **variables: str) -> str:
        """What a command of Slurm says. Raises RuntimeError where it fails."""
        env = {**self.environment, **variables}
        done = self.cluster.launcher.run(*command, folder=self.place.folder, env=env)
        if done.returncode != 0:
            raise RuntimeError(f"{' '.join(command)}: {done.stderr.strip() or done.returncode}")
        return done.stdout

    def submit(self, run: str, *values: str, options: Sequence[str] = (), **variables: str) -> "Job":
        """Queues the workplace's recipe with these values and this name, one rank on each node."""
        layout = ["--parsable", f"--nodes={len(NODES)}", "--ntasks-per-node=1", *options]
        number = self.run("sbatch", *layout, SBATCH, "recipe.yaml", ZERO3, f"run.name={run}", *values, **variables)
        return Job(self, number.strip(), self.place.folder / "runs" / run)

    def ranks(self) -> dict[int, int]:
        """{rank: its process's id} on all nodes."""
        return {number: rank.pid for node in self.cluster.nodes.values() for number, rank in node.ranks().items()}


@dataclass(frozen=True)
class Job:
    """A job of Slurm by its number, and the directory of its run."""

    slurm: Slurm
    number: str
    directory: Path

    def said(self) -> str:
        return (self.slurm.place.folder / f"teamlora-{self.number}.log").read_text()

    def fact(self, name: str) -> str:
        """What Slurm says of the job, such as its JobState."""
        told = self.slurm.run("scontrol", "--oneliner", "show", "job", self.number)
        return dict(word.partition("=")[::2] for word in told.split())[name]

    def come_to(self, step: int) -> None:
        wait_for_steps(self.directory / "metrics.jsonl", step)

    def requeued(self, times: int) -> None:
        """Waits until the job has gone into the queue again for the n-th time."""
        self._until("Restarts", {str(times)})

    def end(self) -> tuple[str, int]:
        """Waits for the job's end; its state and exit status."""
        self._until("JobState", ENDED)
        return self.fact("JobState"), int(self.fact("ExitCode").partition(":")[0])

    def _until(self, name: str, values: set[str]) -> None:
        ending = time.monotonic() + LIMIT
        while self.fact(name) not in values:
            assert time.monotonic() < ending, f"{name}={self.fact(name)}\n{self.said()}"
            time.sleep(0.2)


@contextmanager
def slurm_on(folder: Path, place: Workplace, variables: dict[str, str]) -> Iterator[Slurm]:
    """Hosts with a Slurm that is ready, while the context lasts; `folder` holds settings, keys, state and logs."""
    (folder / "slurm.conf").write_text(SETTINGS.format(folder=folder))
    (folder / "cgroup.conf").write_text("CgroupAutomount=no\n")
    key = folder / "munge.key"
    key.touch(mode=0o600)
    key.write_bytes(os.urandom(128))
    own = {"SLURM_CONF": str(folder / "slurm.conf"), "TEAMLORA_ROOT": str(REPOSITORY)}
    with emulated(folder) as cluster:
        slurm = Slurm(cluster, place, place.environment(**variables, **own))
        for host in (cluster.launcher, *cluster.nodes.values()):
            daemon = "slurmctld" if host is cluster.launcher else "slurmd"
            begun = host.run("sh", "-ec", f"{MUNGED}\n{daemon}", "sh", str(folder), env={"PATH": SYSTEM_PATH, **own})
            if begun.returncode != 0:
                raise RuntimeError(f"{daemon} did not start on {host.name}: {begun.stderr}")
        ending = time.monotonic() + 30
        while slurm.run("sinfo", "--noheader", "--format=%D %t").strip() != f"{len(NODES)} idle":
            if time.monotonic() > ending:
                raise RuntimeError(f"the nodes do not become idle: {slurm.run('sinfo')}")
            time.sleep(0.1)
        yield slurm
