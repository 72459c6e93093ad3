"""What the report says of a check that found nothing wrong; an empty text says nothing."""

from collections.abc import Callable

from trainer.cluster.preflight_facts import ClusterFacts
from trainer.estimate.sizes import GIB


def slots(seen: ClusterFacts) -> str:
    ranks, gpus = sum(seen.slots.values()), sum(len(facts.gpus or ()) for facts in seen.facts.values())
    return f"{counted(ranks, 'rank')} on {counted(gpus, 'GPU') if gpus else 'CPUs'}"


def packages(seen: ClusterFacts) -> str:
    facts = next(iter(seen.facts.values()))
    return ", ".join(f"{name} {found}" for name, found in {"python": facts.python, **facts.versions}.items())


def disk(seen: ClusterFacts) -> str:
    first = seen.facts.get(seen.nodes[0].name)
    if first is None or first.disk is None:
        return ""
    return f"{first.run_directory} can be written, {gib(first.disk)} are free"


def clock(seen: ClusterFacts) -> str:
    furthest = max(abs(answer.clock.ahead) + answer.clock.doubt for answer in seen.answers if answer.clock is not None)
    return f"within {furthest:.1f} s of this machine's"


def port(seen: ClusterFacts) -> str:
    first = seen.facts.get(seen.nodes[0].name)
    return f"{first.port} is free on {seen.nodes[0].name}" if first is not None else ""


def connection(seen: ClusterFacts) -> str:
    first = seen.facts.get(seen.nodes[0].name)
    if first is None or len(seen.facts) == 1:
        return ""
    return f"every node reaches {seen.nodes[0].name} at {first.address}"


def memory(seen: ClusterFacts) -> str:
    if seen.need is None:
        return ""
    return f"a rank needs {gib(seen.need.device)} and {gib(seen.need.host)} of its host, as estimated"


def known(name: str, text: str) -> Callable[[ClusterFacts], str]:
    """A text for where every node that answered knows this of itself."""
    return lambda seen: text if all(getattr(facts, name) is not None for facts in seen.facts.values()) else ""


def counted(number: int, noun: str) -> str:
    """1 rank, 2 ranks."""
    return f"{number} {noun}{'' if number == 1 else 's'}"


def gib(size: int) -> str:
    return f"{size / GIB:.2f} GiB"
