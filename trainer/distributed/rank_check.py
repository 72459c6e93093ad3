"""Checks that all ranks belong to one launch, recipe and set-up, and lets every rank raise what one of them found.

Launchers compare nothing: a node with another version or older code trains along, a missing hostfile starts a run on
one node, and a rank that an earlier launch left behind joins the next launch at its port. All of it in silence.
"""

import contextlib
import os
import platform
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
import torch.distributed as dist

from data_prep.differences import differences
from data_prep.fingerprint import code_hash
from data_prep.user_error import UserError
from trainer.distributed.network import interface_to, machine
from trainer.errors import TrainingFault
from trainer.recipe import Recipe
from trainer.run.launch_protocol import LAUNCH_ID
from trainer.run.provenance import versions


@dataclass(frozen=True)
class RankFacts:
    """What one rank runs. All ranks must agree in everything except host, machine, local_rank and device.

    host: the machine's name, which cloned machines may share. machine: a text that is unique to the machine. device:
    what it computes on, for users.
    """

    host: str
    machine: str
    local_rank: int
    launch: str | None
    versions: dict[str, str]
    code: tuple[str, str]  # sha256 of data_prep's and of trainer's own text
    recipe: dict[str, Any]  # as resolved
    device: str


def own_facts(recipe: Recipe, device: torch.device) -> RankFacts:
    """The facts of this process."""
    return RankFacts(
        socket.gethostname(),
        machine(),
        int(os.environ.get("LOCAL_RANK", "0")),
        os.environ.get(LAUNCH_ID),
        {"python": platform.python_version(), **versions()},
        (code_hash(), code_hash(Path(__file__).parent.parent)),
        recipe.model_dump(mode="json"),
        torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU",
    )


def gather_rank_facts(recipe: Recipe, device: torch.device) -> list[RankFacts]:
    """The facts of every rank, in the order of ranks. Collective: every rank must call it."""
    found: list[RankFacts | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own_facts(recipe, device))
    return cast(list[RankFacts], found)


def gather_local_ranks() -> list[int]:
    """LOCAL_RANK of every rank, in order. Collective: every rank must call it."""
    found = [0] * dist.get_world_size()
    dist.all_gather_object(found, int(os.environ.get("LOCAL_RANK", "0")))
    return found


def check_ranks_agree(ranks: Sequence[RankFacts], nodes: int | None) -> None:
    """Raises UserError where a rank differs from the first, or the ranks are not on as many nodes as run.nodes says."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        where = f"rank {number} on {rank.host}"
        if rank.launch != first.launch:
            raise UserError(
                f"{where} belongs to another launch than rank 0 on {first.host}: one of them was left behind by an "
                "earlier run; end its processes, or give this launch a port of its own (master_port=N)"
            )
        for package, wanted in first.versions.items():
            if rank.versions.get(package) != wanted:
                raise UserError(
                    f"{where} has {package} {rank.versions.get(package)}, rank 0 on {first.host} has {wanted}; install "
                    "the same versions on every node (bash launch/install.sh)"
                )
        if rank.code != first.code:
            raise UserError(
                f"{where} runs other code of this trainer than rank 0 on {first.host}; check out the same commit on "
                "every node"
            )
        for key, wanted, found in differences(first.recipe, rank.recipe):
            raise UserError(
                f"{where} has {key}={found!r}, rank 0 on {first.host} has {wanted!r}; give every node the same recipe"
            )
    by_node = _by_node(ranks)
    if nodes is not None and len(by_node) != nodes:
        raise UserError(
            f"run.nodes={nodes}, and the ranks are on {len(by_node)}: {_listed(by_node)}; give the launcher an "
            "existing hostfile that lists every node, or correct run.nodes"
        )


def describe(ranks: Sequence[RankFacts], seconds: float) -> str:
    """One line about ranks, nodes, devices and versions. seconds: how long the ranks took to meet."""
    by_node = _by_node(ranks)
    place = f"{len(ranks)} on {len(by_node)} node{'s' if len(by_node) > 1 else ''}: {_listed(by_node)}"
    found = ranks[0].versions
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
    devices = " and ".join(Counter(rank.device for rank in ranks))
    return f"ranks           {place}; on {devices}; {interface()}; met in {seconds:.1f} s; {versions}"


def interface() -> str:
    """The network interface by which this rank reaches the first."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(variable):
            return os.environ[variable]
    return interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1")) or "no interface"


@contextlib.contextmanager
def raise_on_all_ranks() -> Iterator[None]:
    """Runs a block in which any rank may find a user's mistake; every rank then raises the UserError of the first.

    After any other error of one rank the others raise a TrainingFault that names it. Collective: ends with one small
    exchange in which every rank must take part. The block itself must contain no collective, since a rank that leaves
    it early would keep the others waiting.
    """
    mistake, fault = None, None
    try:
        yield
    except UserError as error:
        mistake = str(error)
    except Exception as error:
        fault = error
    found: list[tuple[str | None, str | None]] = [(None, None)] * dist.get_world_size()
    dist.all_gather_object(found, (mistake, fault and f"{type(fault).__name__}: {fault}"))
    for text, _ in found:
        if text is not None:
            raise UserError(text)
    if fault is not None:
        raise fault
    for rank, (_, text) in enumerate(found):
        if text is not None:
            raise TrainingFault(f"rank {rank} ended with {' '.join(text.split())[:200]}")


def broadcast_from_rank_0(value: Any) -> Any:
    """Rank 0's value on every rank. Collective: every rank must call it."""
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def _by_node(ranks: Sequence[RankFacts]) -> Counter[tuple[str, str]]:
    """Ranks on each node, by (machine, host)."""
    return Counter((rank.machine, rank.host) for rank in ranks)


def _listed(by_node: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{host} ({count})" for (_, host), count in by_node.items())
