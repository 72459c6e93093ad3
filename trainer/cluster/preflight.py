"""`teamlora check`: finds out within seconds, before anything is loaded, whether a launch can succeed."""

import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from data_prep.tables import text_table
from data_prep.user_error import UserError
from trainer.cluster.hostfile import Node
from trainer.cluster.launch_environment import forwarded_variables
from trainer.cluster.preflight_checks import run_checks
from trainer.cluster.preflight_facts import ALL, ClusterFacts, Finding, Level, Need, counted
from trainer.cluster.probe import Request
from trainer.cluster.probe_client import Answer, probe_hosts, probe_this_machine
from trainer.cluster.ssh import launch_folder
from trainer.recipe import CheckpointConfig
from trainer.recipe_file import load_recipe
from trainer.run.gpu import gpu_files, visible_gpus
from trainer.run.launch_protocol import MISTAKE
from trainer.run.resources import PROGRAM

SILENCE = 12.0  # seconds after which a machine is given up
LIMIT = 12.0  # seconds after which the estimate is given up
CHECKPOINT_BYTES = 12  # per trained parameter: its value and AdamW's moments in fp32
_LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class Report:
    """seconds: how long the check took."""

    findings: tuple[Finding, ...]
    nodes: tuple[Node, ...]
    seconds: float

    @property
    def errors(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "error"]

    @property
    def warnings(self) -> list[Finding]:
        return [finding for finding in self.findings if finding.level == "warning"]

    def __str__(self) -> str:
        """A table with one line per finding, errors last, next to the prompt."""
        ordered = sorted(self.findings, key=lambda finding: _LEVELS.index(finding.level))
        rows = [
            (each.level, each.host, each.what, f"{each.text}; {each.remedy}" if each.remedy else each.text)
            for each in ordered
        ]
        table = text_table(("result", "host", "what", "finding; remedy"), rows, left=range(4))
        return f"{table}\n\n{self.summary}"

    @property
    def summary(self) -> str:
        """One line of counts."""
        counts = f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}"
        return f"{counted(len(self.nodes), 'node')} in {self.seconds:.1f} s: {counts}"

    def as_dict(self) -> dict[str, Any]:
        """The object that `--json` prints."""
        return {
            "passed": not self.errors,
            "nodes": [asdict(node) for node in self.nodes],
            "findings": [asdict(finding) for finding in self.findings],
            "seconds": round(self.seconds, 3),
        }


def check_launch(
    recipe_path: Path,
    overrides: Sequence[str],
    nodes: Sequence[Node] | None,
    master_port: int | None = None,
    limit: float = LIMIT,
) -> Report:
    """Checks all nodes at once over ssh, or without nodes this machine; checks memory if nothing else is wrong.

    master_port: where rank 0 will listen; None for any free port. limit: seconds after which the estimate is given up;
    nodes are given up after SILENCE. Raises UserError for a mistake in the recipe; everything else is a finding.
    """
    started = time.monotonic()
    recipe = load_recipe(recipe_path, tuple(overrides))
    environment, problems = _rank_environment() if nodes is not None else ({}, [])
    request = Request(str(launch_folder()), str(recipe_path), tuple(overrides), master_port or 0, environment)
    hosts = tuple(nodes) if nodes is not None else (Node(socket.gethostname(), _count_gpus() or 1),)
    with _started_estimate(recipe_path, overrides, hosts) as estimate:
        cluster = ClusterFacts(recipe, hosts, *_probe(hosts, request, over_ssh=nodes is not None))
        findings = [*problems, *run_checks(cluster)]
        if not any(finding.level == "error" for finding in findings):  # else report without waiting for the estimate
            need, problem = _finish_estimate(estimate, cluster, started, limit)
            findings = [*run_checks(replace(cluster, need=need)), *problem]
    return Report(tuple(findings), hosts, time.monotonic() - started)


def _count_gpus() -> int:
    """How many GPUs a launch would use, without torch, whose import takes seconds."""
    visible = visible_gpus()
    return len(visible if visible is not None else gpu_files())


def _probe(nodes: Sequence[Node], request: Request, over_ssh: bool) -> tuple[list[Answer], Answer | None]:
    """Answers of the nodes, and of this machine if it is not one of them."""
    if not over_ssh:
        return [probe_this_machine(nodes[0].name, request, SILENCE)], None
    with ThreadPoolExecutor(1) as pool:
        own_request = replace(request, port=None, environment={})
        own = pool.submit(probe_this_machine, socket.gethostname(), own_request, SILENCE)
        answers, here = probe_hosts([node.name for node in nodes], request, SILENCE), own.result()
    machines = {answer.facts.machine for answer in answers if answer.facts is not None}
    is_a_node = here.facts is None or here.facts.machine in machines
    return answers, None if is_a_node else here


@contextmanager
def _started_estimate(recipe: Path, overrides: Sequence[str], nodes: Sequence[Node]) -> Iterator[subprocess.Popen]:
    """`teamlora estimate` as a separate process: it imports torch while nodes are probed, and can be given up."""
    ranks = f"--world-size={sum(node.slots for node in nodes)}"
    equal = [f"--nodes={len(nodes)}"] if len({node.slots for node in nodes}) == 1 else []
    command = [sys.executable, str(PROGRAM), "estimate", str(recipe), *overrides, ranks, *equal, "--json"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(
        command, env=environment, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace"
    ) as process:
        try:
            yield process
        finally:
            process.kill()


def _finish_estimate(
    estimate: subprocess.Popen, cluster: ClusterFacts, started: float, limit: float
) -> tuple[Need | None, list[Finding]]:
    """What a rank needs on the kind of device that the nodes have, or a finding that says why it is unknown."""
    try:
        out, err = estimate.communicate(timeout=max(0.0, started + limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        text = f"not estimated in {limit:.0f} s"
        return None, [Finding("warning", ALL, "memory", text, "run `teamlora estimate RECIPE`, or raise --limit")]
    if estimate.returncode != 0:
        message = (err.strip().splitlines() or ["no output"])[-1].removeprefix("error: ")
        return None, [Finding(_level(estimate.returncode, cluster), ALL, "memory", f"not estimated: {message}")]
    printed = json.loads(out)
    per_checkpoint = printed["trained_parameters"] * CHECKPOINT_BYTES
    disk = per_checkpoint * _count_checkpoints(cluster.recipe.checkpoint, cluster.recipe.train.steps)
    kind = "cuda" if any(facts.gpus for facts in cluster.facts.values()) else "cpu"
    return Need(**printed["peak_on"][kind], disk=disk), []


def _level(status: int, cluster: ClusterFacts) -> Level:
    """Every rank would refuse a mistake in the recipe; a base that only the launching machine lacks is a warning."""
    facts = cluster.here.facts if cluster.here is not None else next(iter(cluster.facts.values()))
    return "error" if status == MISTAKE and facts is not None and facts.base is not None else "warning"


def _count_checkpoints(config: CheckpointConfig, steps: int | None) -> int:
    """The most checkpoints that a run has on disk: those it keeps and the one being written."""
    permanent = steps // config.keep_every if steps is not None and config.keep_every is not None else 0
    return config.keep_last + config.keep_best + permanent + 1


def _rank_environment() -> tuple[dict[str, str], list[Finding]]:
    """The variables that ranks on other nodes get, or a finding that says why they are unknown."""
    try:
        return forwarded_variables(os.environ, Path.cwd()), []
    except UserError as error:
        return {}, [Finding("error", socket.gethostname(), "environment", str(error))]
