"""Whether a launch can go well, found out in seconds and before anything is loaded: `teamlora check`."""

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
from typing import Any, Literal

from data_prep.user_error import UserError
from trainer.cluster.hostfile import Node
from trainer.cluster.launch_environment import passed_on
from trainer.cluster.local_ranks import visible_gpus
from trainer.cluster.preflight_checks import findings
from trainer.cluster.preflight_facts import ALL, ClusterFacts, Finding, Need
from trainer.cluster.preflight_summary import counted
from trainer.cluster.probe import Request
from trainer.cluster.probe_client import Answer, ask_all, ask_here
from trainer.cluster.ssh import REPOSITORY, launch_folder
from trainer.recipe import CheckpointConfig
from trainer.recipe_file import load_recipe
from trainer.run.launch_protocol import MISTAKE

SILENCE = 12.0  # seconds after which a machine is given up
LIMIT = 12.0  # seconds after which the estimate is
STATE = 12  # bytes of a checkpoint a trained parameter: value and AdamW's moments in fp32
_LEVELS = ("ok", "warning", "error")


@dataclass(frozen=True)
class Report:
    """seconds: that the check took."""

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
        """A table, a finding a line; errors come last, next to the prompt."""
        ordered = sorted(self.findings, key=lambda finding: _LEVELS.index(finding.level))
        width = max([len("host"), *(len(finding.host) for finding in ordered)]) + 2
        lines = [f"{'result':9}{'host':{width}}{'what':15}finding; remedy"]
        for finding in ordered:
            text = f"{finding.text}; {finding.remedy}" if finding.remedy else finding.text
            lines.append(f"{finding.level:9}{finding.host:{width}}{finding.what:15}{text}")
        return "\n".join([*lines, "", self.summary])

    @property
    def summary(self) -> str:
        """In a few words."""
        counts = f"{counted(len(self.errors), 'error')}, {counted(len(self.warnings), 'warning')}"
        return f"{counted(len(self.nodes), 'node')} in {self.seconds:.1f} s: {counts}"

    def as_dict(self) -> dict[str, Any]:
        """For JSON."""
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
    """Looks at all nodes at once, over ssh, or without nodes at this machine alone; at memory where all else is right.

    master_port: where rank 0 will listen; None for any that is free. limit: seconds after which the estimate is given
    up; a node is after 12. Raises UserError for a mistake in the recipe, and for nothing that a node says or leaves
    unsaid.
    """
    started = time.monotonic()
    recipe = load_recipe(recipe_path, tuple(overrides))
    environment, problems = _passed_on() if nodes is not None else ({}, [])
    request = Request(str(launch_folder()), str(recipe_path), tuple(overrides), master_port or 0, environment)
    hosts = tuple(nodes) if nodes is not None else (Node(socket.gethostname(), _gpus_here() or 1),)
    with _estimating(recipe_path, overrides, sum(node.slots for node in hosts)) as estimating:
        seen = ClusterFacts(recipe, hosts, *_answers(hosts, request, over_ssh=nodes is not None))
        found = [*problems, *findings(seen)]
        if not any(finding.level == "error" for finding in found):  # else they are told at once
            need, problem = _estimated(estimating, seen, started, limit)
            found = [*findings(replace(seen, need=need)), *problem]
    return Report(tuple(found), hosts, time.monotonic() - started)


def _gpus_here() -> int:
    """Those that a launch would use, counted without torch, whose import takes seconds."""
    visible = visible_gpus()
    return len(visible if visible is not None else list(Path("/dev").glob("nvidia[0-9]*")))


def _answers(nodes: Sequence[Node], request: Request, over_ssh: bool) -> tuple[list[Answer], Answer | None]:
    """Of the nodes; and of this machine, where it is none of them."""
    if not over_ssh:
        return [ask_here(nodes[0].name, request, SILENCE)], None
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask_here, socket.gethostname(), replace(request, port=None, environment={}), SILENCE)
        answers, here = ask_all([node.name for node in nodes], request, SILENCE), asked.result()
    machines = {answer.facts.machine for answer in answers if answer.facts is not None}
    is_a_node = here.facts is None or here.facts.machine in machines
    return answers, None if is_a_node else here


@contextmanager
def _estimating(recipe: Path, overrides: Sequence[str], ranks: int) -> Iterator[subprocess.Popen]:
    """`teamlora estimate` in a process of its own: it imports torch while the nodes are asked, and can be given up."""
    command = [sys.executable, "-m", "trainer", "estimate", str(recipe), *overrides, f"--world-size={ranks}", "--json"]
    path = os.pathsep.join(filter(None, (str(REPOSITORY), os.environ.get("PYTHONPATH"))))
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    pipe = subprocess.PIPE
    with subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True) as process:
        try:
            yield process
        finally:
            process.kill()


def _estimated(
    estimating: subprocess.Popen, seen: ClusterFacts, started: float, limit: float
) -> tuple[Need | None, list[Finding]]:
    """What a rank needs on the nodes' kind of device, or why that is not known."""
    try:
        out, err = estimating.communicate(timeout=max(0.0, started + limit - time.monotonic()))
    except subprocess.TimeoutExpired:
        text = f"not estimated in {limit:.0f} s"
        return None, [Finding("warning", ALL, "memory", text, "run `teamlora estimate RECIPE`, or give --limit")]
    if estimating.returncode != 0:
        said = (err.strip().splitlines() or ["nothing was said"])[-1].removeprefix("error: ")
        return None, [Finding(_level(estimating.returncode, seen), ALL, "memory", f"not estimated: {said}")]
    found = json.loads(out)
    state = found["trained_parameters"] * STATE
    disk = state * _checkpoints(seen.recipe.checkpoint, seen.recipe.train.steps)
    kind = "cuda" if any(facts.gpus for facts in seen.facts.values()) else "cpu"
    return Need(**found["peak_on"][kind], disk=disk), []


def _level(status: int, seen: ClusterFacts) -> Literal["warning", "error"]:
    """A mistake in the recipe would be refused by every rank; what the launching machine alone lacks would not."""
    facts = seen.here.facts if seen.here is not None else next(iter(seen.facts.values()))
    return "error" if status == MISTAKE and facts.base is not None else "warning"


def _checkpoints(config: CheckpointConfig, steps: int | None) -> int:
    """How many a run has on the disk at most: those kept, and the one that is being written."""
    for_good = steps // config.keep_every if steps is not None and config.keep_every is not None else 0
    return config.keep_last + config.keep_best + for_good + 1


def _passed_on() -> tuple[dict[str, str], list[Finding]]:
    """What ranks on other nodes are given, or why that is not known."""
    try:
        return passed_on(os.environ, Path.cwd()), []
    except UserError as error:
        return {}, [Finding("error", socket.gethostname(), "environment", str(error))]
