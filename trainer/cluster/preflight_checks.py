"""The checks of a set-up: plain functions that find problems in the facts of all machines."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from data_prep.differences import differences
from trainer.base.model_folder import may_be_of_the_hub
from trainer.cluster.preflight_facts import ALL, GIB, ClusterFacts, Finding, Level, counted, gib
from trainer.cluster.probe import SAMPLED
from trainer.cluster.probe_client import Failure
from trainer.distributed.rank_groups import crosses_nodes, local_ranks_of
from trainer.run.resources import PACKAGE_ROOT

LEAST_DISK = 2**27  # bytes for what a run writes besides checkpoints
CLOCK = 5.0  # seconds that clocks may differ
BASE_COMPARED = f"compared: configuration, tokenizer, tensor names and shapes, some bytes of up to {SAMPLED} tensors"
INSTALL = f"create the checkout and its .venv at the same path on that node ({PACKAGE_ROOT}): bash launch/install.sh"

_SSH_REMEDIES = {  # by what ssh prints
    "Could not resolve hostname": "correct the name in the hostfile, or add it to /etc/hosts or ~/.ssh/config",
    "Permission denied": "install this machine's key there: ssh-copy-id {host}",
    "Host key verification failed": "accept the machine's host key once: ssh {host}",
    "Connection refused": "start sshd there, or set its port in ~/.ssh/config",
}


class _Problem(NamedTuple):
    level: Level
    host: str
    text: str
    remedy: str


_Find = Callable[[ClusterFacts], Iterator[_Problem]]


@dataclass(frozen=True)
class _Check:
    """find: yields what is wrong. passed: the report's text if nothing is; no line if it is empty."""

    what: str
    find: _Find
    passed: Callable[[ClusterFacts], str] = lambda cluster: ""


def run_checks(cluster: ClusterFacts) -> list[Finding]:
    """Runs every check; each yields its problems or at most one finding of level "ok"."""
    found: list[Finding] = []
    for check in _CHECKS:
        problems = list(check.find(cluster))
        found += [Finding(level, host, check.what, text, remedy) for level, host, text, remedy in problems]
        if not problems and cluster.facts and (text := check.passed(cluster)):
            found.append(Finding("ok", ALL, check.what, text))
    return found


def _find_unreached(cluster: ClusterFacts) -> Iterator[_Problem]:
    for answer in cluster.answers:
        if answer.failure is not None:
            yield _Problem("error", answer.host, *_explain(answer.host, answer.failure))


def _explain(host: str, failure: Failure) -> tuple[str, str]:
    """(text, remedy) for a probe that did not answer."""
    output = failure.last_line or "no output"
    if failure.status is None:
        return f"no answer in time ({output})", f"see what delays it: ssh {host}"
    if failure.status == 255:  # from ssh itself
        known = (remedy for text, remedy in _SSH_REMEDIES.items() if text in output)
        remedy = next(known, "check that it is up and that `ssh {host}` works without a prompt")
        return f"not reached: {output}", remedy.format(host=host)
    if re.search(r"\bcd\b", output) or "No module named 'trainer" in output:
        return f"no checkout at {PACKAGE_ROOT} ({output})", INSTALL
    if failure.status in (126, 127) or "No module named" in output:
        return f"no interpreter at {sys.executable} with this project's packages ({output})", INSTALL
    return f"the check failed there ({output})", f"bring it to the same commit; {INSTALL}"


def _find_wrong_node_count(cluster: ClusterFacts) -> Iterator[_Problem]:
    wanted = cluster.recipe.run.nodes
    if wanted is not None and wanted != len(cluster.nodes):
        text = f"run.nodes={wanted}, but the launch is on {counted(len(cluster.nodes), 'node')}"
        yield _Problem("error", ALL, text, "give a hostfile that lists every node, or correct run.nodes")


def _find_same_machine(cluster: ClusterFacts) -> Iterator[_Problem]:
    names: dict[str, str] = {}
    for host, facts in cluster.facts.items():
        first = names.setdefault(facts.machine, host)
        if first != host:
            text = f"is the same machine as {first}: both are {facts.hostname}"
            yield _Problem("error", host, text, "list each machine once, with all its slots")


def _find_bad_slots(cluster: ClusterFacts) -> Iterator[_Problem]:
    with_gpus = [host for host, facts in cluster.facts.items() if facts.gpus]
    for host, facts in cluster.facts.items():
        slots, gpus = cluster.slots[host], facts.gpus
        if gpus is None:
            yield _Problem("error", host, f"its GPUs cannot be used: {facts.problems['gpus']}", "run nvidia-smi there")
        elif with_gpus and not gpus:
            text = f"has no GPU, but {with_gpus[0]} has"
            yield _Problem("error", host, text, "run nvidia-smi there, or remove it from the hostfile")
        elif gpus and slots > len(gpus):
            text = f"slots={slots}, but it has {counted(len(gpus), 'GPU')}"
            yield _Problem("error", host, text, f"write slots={len(gpus)} in the hostfile")
        elif not gpus and slots > facts.cores:
            text = f"slots={slots}, but it has {counted(facts.cores, 'core')} and no GPU"
            yield _Problem("warning", host, text, f"write slots={facts.cores} in the hostfile")


def _find_bad_shard_group(cluster: ClusterFacts) -> Iterator[_Problem]:
    recipe, slots = cluster.recipe, list(cluster.slots.values())
    for what, group in (("base", recipe.base.shard_group), ("adapter", recipe.adapter.shard_group)):
        key = f"{what}.shard_group={group}"
        if group == "node" and len(set(slots)) > 1:
            text = f"{key}, but the nodes have {', '.join(map(str, slots))} slots"
            yield _Problem("error", ALL, text, f"give every node as many, or set a number that divides {cluster.ranks}")
        elif isinstance(group, int) and cluster.ranks % group == 0 and crosses_nodes(group, local_ranks_of(slots)):
            text = f"{key}: a group would span two nodes, so every layer of the {what} crosses the network"
            yield _Problem("warning", ALL, text, "choose a divisor of the slots per node, or node")


def _describe_slots(cluster: ClusterFacts) -> str:
    gpus = sum(len(facts.gpus or ()) for facts in cluster.facts.values())
    return f"{counted(cluster.ranks, 'rank')} on {counted(gpus, 'GPU') if gpus else 'CPUs'}"


def _problems_named(name: str, remedy: str) -> _Find:
    """A check for what a machine reported in Facts.problems under this name."""

    def find(cluster: ClusterFacts) -> Iterator[_Problem]:
        for host, facts in cluster.facts.items():
            if name in facts.problems:
                yield _Problem("error", host, facts.problems[name], remedy)

    return find


def _known_everywhere(name: str, text: str) -> Callable[[ClusterFacts], str]:
    """`text` if every node that answered knows this of itself, else nothing."""
    return lambda cluster: text if all(getattr(facts, name) is not None for facts in cluster.facts.values()) else ""


def _most_common(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The first host that has the most common value, and the value; of equally common values the first."""
    texts = {host: json.dumps(value, sort_keys=True) for host, value in values.items()}
    most = Counter(texts.values()).most_common(1)[0][0]
    host = next(host for host, text in texts.items() if text == most)
    return host, values[host]


def _deviations(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(host, its value, a host with the most common value, that value) for every host with another value."""
    known = {host: value for host, value in values.items() if value is not None}
    if known:
        usual_host, usual = _most_common(known)
        yield from ((host, value, usual_host, usual) for host, value in known.items() if value != usual)


def _find_differing(cluster: ClusterFacts, name: str, text: str, compared: str = "") -> Iterator[_Problem]:
    """Hosts whose file or folder differs although it must be the same everywhere."""
    for host, _, other, _ in _deviations({host: getattr(facts, name) for host, facts in cluster.facts.items()}):
        yield _Problem("error", host, f"{text} on {other}{compared}", f"copy it from {other}")


def _find_other_packages(cluster: ClusterFacts) -> Iterator[_Problem]:
    values = {host: {"python": facts.python, **facts.versions} for host, facts in cluster.facts.items()}
    for package in dict.fromkeys(name for each in values.values() for name in each):
        versions = {host: each.get(package) or "not installed" for host, each in values.items()}
        for host, version, other, usual in _deviations(versions):
            yield _Problem(
                "error", host, f"{package} is {version}, but {usual} on {other}", "bash launch/install.sh there"
            )


def _describe_packages(cluster: ClusterFacts) -> str:
    facts = next(iter(cluster.facts.values()))
    return ", ".join(f"{name} {version}" for name, version in {"python": facts.python, **facts.versions}.items())


def _find_other_code(cluster: ClusterFacts) -> Iterator[_Problem]:
    for host, _, other, _ in _deviations({host: facts.code for host, facts in cluster.everywhere.items()}):
        yield _Problem("error", host, f"has other trainer code than {other}", "bring it to the same commit")


def _find_other_recipe(cluster: ClusterFacts) -> Iterator[_Problem]:
    remedy = "give every node the same recipe"
    yield from _problems_named("recipe", remedy)(cluster)
    for host, recipe, other, usual in _deviations({host: facts.recipe for host, facts in cluster.everywhere.items()}):
        changes = list(differences(usual, recipe))
        key, expected, value = changes[0]
        more = f" ({counted(len(changes) - 1, 'more key')} differ)" if len(changes) > 1 else ""
        yield _Problem("error", host, f"has {key}={value!r}, but {other} has {expected!r}{more}", remedy)


def _find_other_deepspeed_config(cluster: ClusterFacts) -> Iterator[_Problem]:
    yield from _problems_named("deepspeed", "copy it to the same path there")(cluster)
    text = f"deepspeed.config={cluster.recipe.deepspeed.config} differs from the file"
    yield from _find_differing(cluster, "deepspeed", text)


def _find_other_base(cluster: ClusterFacts) -> Iterator[_Problem]:
    for host, facts in cluster.facts.items():
        if problem := facts.problems.get("base"):
            yield _missing_base(cluster, host, problem)
    text = f"base.model={cluster.recipe.base.model} differs from that"
    yield from _find_differing(cluster, "base", text, f" ({BASE_COMPARED})")


def _missing_base(cluster: ClusterFacts, host: str, problem: str) -> _Problem:
    model = cluster.recipe.base.model
    others = [other for other, facts in cluster.facts.items() if facts.base_in_folder]
    if others:
        text = f"base.model={model} is missing, but {others[0]} has it"
        return _Problem("error", host, text, f"copy it from {others[0]}")
    if may_be_of_the_hub(model):
        text = f"base.model={model} is neither a folder there nor in its Hub cache, so it will be downloaded"
        return _Problem("warning", host, text, "download it first, or give a folder that every node has")
    return _Problem("error", host, problem, "copy it to the same path there")


def _find_other_prepared_set(cluster: ClusterFacts) -> Iterator[_Problem]:
    yield from _problems_named("prepared", "run `teamlora prepare` there, or copy the set to the same path")(cluster)
    text = f"data.prepared_dir={cluster.recipe.data.prepared_dir} differs from the set"
    yield from _find_differing(cluster, "prepared", text)


def _find_bad_run_directory(cluster: ClusterFacts) -> Iterator[_Problem]:
    """An error on the first node only; ranks on the others write nothing, unless their node becomes the first."""
    needed = max(LEAST_DISK, cluster.need.disk if cluster.need is not None else 0)
    for host, facts in cluster.facts.items():
        level: Level = "error" if host == cluster.nodes[0].name else "warning"
        if problem := facts.problems.get("run_directory"):
            text = f"run.output_dir={cluster.recipe.run.output_dir}: {problem}"
            yield _Problem(level, host, text, "give a folder that can be written")
        elif facts.disk is not None and facts.disk < needed:
            text = f"{gib(facts.disk)} free at {facts.run_directory}, but the run writes {gib(needed)}"
            yield _Problem(level, host, text, "free space, change run.output_dir, or lower checkpoint.keep_last")


def _describe_run_directory(cluster: ClusterFacts) -> str:
    first = cluster.first
    return f"{first.run_directory} is writable, {gib(first.disk)} free" if first and first.disk is not None else ""


def _find_wrong_clocks(cluster: ClusterFacts) -> Iterator[_Problem]:
    for answer in cluster.answers:
        clock = answer.clock
        if clock is not None and abs(clock.ahead) - clock.uncertainty > CLOCK:
            direction = "ahead of" if clock.ahead > 0 else "behind"
            text = f"its clock is {abs(clock.ahead):.0f} s {direction} this machine's"
            yield _Problem("warning", answer.host, text, "synchronize both by NTP")


def _describe_clocks(cluster: ClusterFacts) -> str:
    clocks = (answer.clock for answer in cluster.answers if answer.clock is not None)
    return f"within {max(abs(clock.ahead) + clock.uncertainty for clock in clocks):.1f} s of this machine's"


def _describe_port(cluster: ClusterFacts) -> str:
    return f"{cluster.first.port} is free on {cluster.nodes[0].name}" if cluster.first else ""


def _find_failed_connections(cluster: ClusterFacts) -> Iterator[_Problem]:
    for answer in cluster.answers:
        if answer.unreachable is not None:
            text = f"cannot reach {cluster.nodes[0].name} at {answer.unreachable}"
            yield _Problem(
                "error", answer.host, text, "open all ports between the nodes, and check the route from there"
            )


def _describe_connections(cluster: ClusterFacts) -> str:
    if cluster.first is None or len(cluster.facts) == 1:
        return ""
    return f"every node reaches {cluster.nodes[0].name} at {cluster.first.address}"


def _find_too_little_memory(cluster: ClusterFacts) -> Iterator[_Problem]:
    need = cluster.need
    if need is None:
        return
    for host, facts in cluster.facts.items():
        slots = cluster.slots[host]
        for gpu in (facts.gpus or [])[:slots]:
            if gpu.free is not None and gpu.total is not None and need.device > gpu.free:
                free = f"{gib(gpu.free)} of {gib(gpu.total)} free"
                text = f"a rank needs {gib(need.device)}, but GPU {gpu.index} has {free}"
                occupied = need.device <= gpu.total
                remedy = (
                    "end other processes on it, see nvidia-smi" if occupied else _fitting("gpu", gpu.total, cluster)
                )
                yield _Problem("error", host, text, remedy)
        per_rank = need.host if facts.gpus else need.host + need.device
        if per_rank * slots > facts.memory:
            ranks = "rank needs" if slots == 1 else "ranks need"
            text = f"{slots} {ranks} {gib(per_rank * slots)} of host memory, but {gib(facts.memory)} is free"
            yield _Problem("error", host, text, _fitting("host", facts.memory // slots, cluster))


def _fitting(memory: str, size: int, cluster: ClusterFacts) -> str:
    """A remedy: the command that shows which changes would fit."""
    limit = f"--{memory}-memory {size / GIB:.1f}GiB"
    return f"see what would fit: teamlora estimate RECIPE --world-size {cluster.ranks} {limit}"


def _describe_memory(cluster: ClusterFacts) -> str:
    need = cluster.need
    return f"a rank needs {gib(need.device)} on its device and {gib(need.host)} on its host (estimated)" if need else ""


_CHECKS = (
    _Check("reached", _find_unreached, lambda cluster: counted(len(cluster.nodes), "machine")),
    _Check("nodes", _find_wrong_node_count),
    _Check("machine", _find_same_machine, lambda cluster: "all different" if len(cluster.facts) > 1 else ""),
    _Check("slots", _find_bad_slots, _describe_slots),
    _Check("shard group", _find_bad_shard_group),
    _Check("folder", _problems_named("folder", "create it there, with all that the recipe names")),
    _Check("packages", _find_other_packages, _describe_packages),
    _Check("code", _find_other_code, lambda cluster: f"the same at {PACKAGE_ROOT}"),
    _Check("recipe", _find_other_recipe, _known_everywhere("recipe", "the same, as resolved")),
    _Check("deepspeed", _find_other_deepspeed_config, _known_everywhere("deepspeed", "the same file")),
    _Check("base", _find_other_base, _known_everywhere("base", f"the same ({BASE_COMPARED})")),
    _Check(
        "prepared",
        _find_other_prepared_set,
        _known_everywhere("prepared", "the same (compared: key of the set, sizes of its files)"),
    ),
    _Check("run directory", _find_bad_run_directory, _describe_run_directory),
    _Check("clock", _find_wrong_clocks, _describe_clocks),
    _Check(
        "port", _problems_named("port", "give another with --master-port, or end what listens there"), _describe_port
    ),
    _Check("connection", _find_failed_connections, _describe_connections),
    _Check("memory", _find_too_little_memory, _describe_memory),
)
