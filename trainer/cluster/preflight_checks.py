"""What is wrong with a set-up, from what its machines told: plain functions of facts."""

import json
import re
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal

from data_prep.differences import differences
from trainer.base.model_folder import may_be_of_the_hub
from trainer.cluster import preflight_summary
from trainer.cluster.preflight_facts import ALL, ClusterFacts, Finding
from trainer.cluster.preflight_summary import counted, gib
from trainer.cluster.probe import SAMPLED
from trainer.cluster.probe_client import Failure
from trainer.cluster.ssh import REPOSITORY
from trainer.estimate.sizes import GIB

LEAST_DISK = 2**27  # bytes for what a run writes beside checkpoints
CLOCK = 5.0  # seconds
COMPARED = f"configuration, tokenizer, names and shapes of tensors, some bytes of up to {SAMPLED} of them"  # of a base
INSTALL = f"make the checkout and its .venv at this path on that node: {REPOSITORY}, bash launch/install.sh"

_SSH = {  # what ssh says: the remedy
    "Could not resolve hostname": "correct the name in the hostfile, or make it known in /etc/hosts or ~/.ssh/config",
    "Permission denied": "let this machine's key in: ssh-copy-id {host}",
    "Host key verification failed": "accept the machine's key once: ssh {host}",
    "Connection refused": "start sshd there, or name its port in ~/.ssh/config",
}


def findings(seen: ClusterFacts) -> list[Finding]:
    """Every check's findings: those of hosts with a mistake, or one that says what is in order."""
    found: list[Finding] = []
    for what, (check, describe) in _CHECKS.items():
        bad = [Finding(level, host, what, text, remedy) for level, host, text, remedy in check(seen)]
        found += bad
        if not bad and seen.facts and (text := describe(seen)):
            found.append(Finding("ok", ALL, what, text))
    return found


_Level = Literal["warning", "error"]
_Found = Iterator[tuple[_Level, str, str, str]]  # level, host, text, remedy
_Check = Callable[[ClusterFacts], _Found]


def _unreached(seen: ClusterFacts) -> _Found:
    for answer in seen.answers:
        if answer.failure is not None:
            yield "error", answer.host, *_failure(answer.host, answer.failure)


def _failure(host: str, failure: Failure) -> tuple[str, str]:
    """Text and remedy for a command that did not answer."""
    said = failure.said or "nothing was said"
    if failure.status is None:
        return f"no answer in time ({said})", f"see what keeps it: ssh {host}"
    if failure.status == 255:  # ssh's own
        known = (remedy for text, remedy in _SSH.items() if text in said)
        remedy = next(known, "see that it is up, and that `ssh {host}` works without a question")
        return f"not reached: {said}", remedy.format(host=host)
    if re.search(r"\bcd\b", said) or "No module named 'trainer" in said:
        return f"no checkout at {REPOSITORY} ({said})", INSTALL
    if failure.status in (126, 127) or "No module named" in said:
        return f"no interpreter at {sys.executable} with this project's packages ({said})", INSTALL
    return f"does not answer as this code does ({said})", f"bring it to the same commit; {INSTALL}"


def _run_nodes(seen: ClusterFacts) -> _Found:
    wanted = seen.recipe.run.nodes
    if wanted is not None and wanted != len(seen.nodes):
        text = f"run.nodes={wanted}, and the launch is on {counted(len(seen.nodes), 'node')}"
        yield "error", ALL, text, "give a hostfile that lists every node, or correct run.nodes"


def _same_machine(seen: ClusterFacts) -> _Found:
    names: dict[str, str] = {}
    for host, facts in seen.facts.items():
        first = names.setdefault(facts.machine, host)
        if first != host:
            text = f"is the same machine as {first}: both are {facts.hostname}"
            yield "error", host, text, "list a machine once, with all its slots"


def _slots(seen: ClusterFacts) -> _Found:
    with_gpus = [host for host, facts in seen.facts.items() if facts.gpus]
    for host, facts in seen.facts.items():
        slots, gpus = seen.slots[host], facts.gpus
        if gpus is None:
            yield "error", host, f"its GPUs cannot be used: {facts.problems['gpus']}", "see nvidia-smi there"
        elif with_gpus and not gpus:
            yield "error", host, f"has no GPU, as {with_gpus[0]} has", "see nvidia-smi there, or take it off the list"
        elif gpus and slots > len(gpus):
            text = f"slots={slots}, and it has {counted(len(gpus), 'GPU')}"
            yield "error", host, text, f"write slots={len(gpus)} in the hostfile"
        elif not gpus and slots > facts.cores:
            text = f"slots={slots} on {counted(facts.cores, 'core')}, without a GPU"
            yield "warning", host, text, f"write slots={facts.cores} in the hostfile"


def _told(name: str, remedy: str) -> _Check:
    """A check of what a machine could not find out by itself."""

    def check(seen: ClusterFacts) -> _Found:
        for host, facts in seen.facts.items():
            if name in facts.problems:
                yield "error", host, facts.problems[name], remedy

    return check


def _usual(values: Mapping[str, Any]) -> tuple[str, Any]:
    """The value that most hosts have, and the first host with it; of several such values the first."""
    texts = {host: json.dumps(value, sort_keys=True) for host, value in values.items()}
    most = Counter(texts.values()).most_common(1)[0][0]
    host = next(host for host, text in texts.items() if text == most)
    return host, values[host]


def _others(values: Mapping[str, Any]) -> Iterator[tuple[str, Any, str, Any]]:
    """(host, its value, a host with the usual value, that) of every host with another value."""
    known = {host: value for host, value in values.items() if value is not None}
    if known:
        usual_host, usual = _usual(known)
        yield from ((host, value, usual_host, usual) for host, value in known.items() if value != usual)


def _unlike(seen: ClusterFacts, name: str, text: str, compared: str = "") -> _Found:
    """Hosts with another of what is to be the same file or folder everywhere."""
    for host, _, other, _ in _others({host: getattr(facts, name) for host, facts in seen.facts.items()}):
        yield "error", host, f"{text} than on {other}{compared}", f"copy it from {other}"


def _packages(seen: ClusterFacts) -> _Found:
    values = {host: {"python": facts.python, **facts.versions} for host, facts in seen.facts.items()}
    for package in dict.fromkeys(name for each in values.values() for name in each):
        of = {host: each.get(package) or "not installed" for host, each in values.items()}
        for host, found, other, wanted in _others(of):
            yield "error", host, f"{package} is {found}, on {other} {wanted}", "bash launch/install.sh there"


def _code(seen: ClusterFacts) -> _Found:
    for host, _, other, _ in _others({host: facts.code for host, facts in seen.everywhere.items()}):
        yield "error", host, f"has other code of this trainer than {other}", "bring it to the same commit"


def _recipe(seen: ClusterFacts) -> _Found:
    yield from _told("recipe", "give every node the same recipe")(seen)
    recipes = {host: facts.recipe for host, facts in seen.everywhere.items()}
    for host, found, other, wanted in _others(recipes):
        changes = list(differences(wanted, found))
        key, before, now = changes[0]
        more = f" ({len(changes) - 1} more keys differ)" if len(changes) > 1 else ""
        yield "error", host, f"has {key}={now!r}, {other} has {before!r}{more}", "give every node the same recipe"


def _deepspeed(seen: ClusterFacts) -> _Found:
    yield from _told("deepspeed", "copy it to the same path there")(seen)
    yield from _unlike(seen, "deepspeed", f"deepspeed.config={seen.recipe.deepspeed.config} is another file")


def _base(seen: ClusterFacts) -> _Found:
    for host, facts in seen.facts.items():
        if problem := facts.problems.get("base"):
            yield _absent_base(seen, host, problem)
    yield from _unlike(seen, "base", f"base.model={seen.recipe.base.model} is another", f" ({COMPARED})")


def _absent_base(seen: ClusterFacts, host: str, problem: str) -> tuple[_Level, str, str, str]:
    model = seen.recipe.base.model
    others = [other for other, facts in seen.facts.items() if facts.base_in_folder]
    if others:
        return "error", host, f"base.model={model}: not there, as it is on {others[0]}", f"copy it from {others[0]}"
    if may_be_of_the_hub(model):
        text = f"base.model={model} is no folder there, and not in its cache of the Hub, from which it will be fetched"
        return "warning", host, text, "fetch it before, or give a folder that every node has"
    return "error", host, problem, "copy it to the same path there"


def _prepared(seen: ClusterFacts) -> _Found:
    yield from _told("prepared", "do so there, or copy the set to the same path")(seen)
    yield from _unlike(seen, "prepared", f"data.prepared_dir={seen.recipe.data.prepared_dir} is another set")


def _run_directory(seen: ClusterFacts) -> _Found:
    """An error on the first node only: the others' ranks write nothing, unless one of them becomes the first."""
    needed = max(LEAST_DISK, seen.need.disk if seen.need is not None else 0)
    for host, facts in seen.facts.items():
        level = "error" if host == seen.nodes[0].name else "warning"
        if problem := facts.problems.get("run_directory"):
            yield level, host, f"run.output_dir={seen.recipe.run.output_dir}: {problem}", "give a folder of its own"
        elif facts.disk is not None and facts.disk < needed:
            text = f"{gib(facts.disk)} free at {facts.run_directory}, and the run writes {gib(needed)}"
            yield level, host, text, "make room, give another run.output_dir, or lower checkpoint.keep_last"


def _clock(seen: ClusterFacts) -> _Found:
    for answer in seen.answers:
        if answer.clock is not None and abs(answer.clock.ahead) - answer.clock.doubt > CLOCK:
            way = "ahead of" if answer.clock.ahead > 0 else "behind"
            text = f"its clock is {abs(answer.clock.ahead):.0f} s {way} this machine's"
            yield "warning", answer.host, text, "set both by NTP"


def _connection(seen: ClusterFacts) -> _Found:
    for answer in seen.answers:
        if answer.unreached is not None:
            text = f"does not reach {seen.nodes[0].name} at {answer.unreached}"
            yield "error", answer.host, text, "open all ports between the nodes, and see the route from there"


def _memory(seen: ClusterFacts) -> _Found:
    if seen.need is None:
        return
    for host, facts in seen.facts.items():
        slots = seen.slots[host]
        for gpu in (facts.gpus or [])[:slots]:
            if gpu.free is not None and gpu.total is not None and seen.need.device > gpu.free:
                yield "error", host, *_lacks(seen.need.device, gpu.free, gpu.total, f"GPU {gpu.index}", seen)
        each = seen.need.host if facts.gpus else seen.need.host + seen.need.device
        if each * slots > facts.memory:
            need = "rank needs" if slots == 1 else "ranks need"
            text = f"{slots} {need} {gib(each * slots)} of host memory, and {gib(facts.memory)} are free"
            yield "error", host, text, _smaller(seen, "--host-memory", facts.memory // slots)


def _lacks(needed: int, free: int, total: int, which: str, seen: ClusterFacts) -> tuple[str, str]:
    text = f"a rank needs {gib(needed)}, and {gib(free)} of the {gib(total)} of {which} are free"
    if needed <= total:
        return text, "end what else runs there, see nvidia-smi"
    return text, _smaller(seen, "--gpu-memory", total)


def _smaller(seen: ClusterFacts, option: str, size: int) -> str:
    ranks = sum(seen.slots.values())
    return f"see what would fit: teamlora estimate RECIPE --world-size {ranks} {option} {size / GIB:.1f}GiB"


_CHECKS: dict[str, tuple[_Check, Callable[[ClusterFacts], str]]] = {  # and what is said where all is in order
    "reached": (_unreached, lambda seen: f"{counted(len(seen.nodes), 'machine')} in all"),
    "nodes": (_run_nodes, lambda seen: ""),
    "machine": (_same_machine, lambda seen: "each is another" if len(seen.facts) > 1 else ""),
    "slots": (_slots, preflight_summary.slots),
    "folder": (_told("folder", "make it there, with all that the recipe names"), lambda seen: ""),
    "packages": (_packages, preflight_summary.packages),
    "code": (_code, lambda seen: f"{REPOSITORY}: the same"),
    "recipe": (_recipe, preflight_summary.known("recipe", "the same, as resolved")),
    "deepspeed": (_deepspeed, preflight_summary.known("deepspeed", "the same file")),
    "base": (_base, preflight_summary.known("base", f"the same: {COMPARED}")),
    "prepared": (_prepared, preflight_summary.known("prepared", "the same: key of the set, size of its files")),
    "run directory": (_run_directory, preflight_summary.disk),
    "clock": (_clock, preflight_summary.clock),
    "port": (_told("port", "give another with --master-port, or end what listens there"), preflight_summary.port),
    "connection": (_connection, preflight_summary.connection),
    "memory": (_memory, preflight_summary.memory),
}
