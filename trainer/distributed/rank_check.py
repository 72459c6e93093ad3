"""Whether all ranks are of one launch, one recipe and one set-up: compared before anything is loaded.

Launchers compare nothing: a node with another version or older code trains along, a missing hostfile starts a run of
one node, and a rank that was left behind by a launch joins the next at its port. All of it in silence.
"""

import os
import platform
import socket
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch.distributed as dist

from data_prep.differences import differences
from data_prep.fingerprint import code_hash
from data_prep.user_error import UserError
from trainer.distributed.network import interface_to, machine
from trainer.recipe import Recipe
from trainer.run.launch_protocol import LAUNCH_ID
from trainer.run.provenance import versions


@dataclass(frozen=True)
class RankFacts:
    """What one rank is. Those of all ranks are to agree, but for host, machine and local_rank.

    host: a name for a person, which cloned machines may share. machine: the same text on the same machine only.
    """

    host: str
    machine: str
    local_rank: int
    launch: str | None
    versions: dict[str, str]
    code: tuple[str, str]  # sha256 of data_prep's and of trainer's own text
    recipe: dict[str, Any]  # as resolved


def own_facts(recipe: Recipe) -> RankFacts:
    """The facts of this process."""
    return RankFacts(
        socket.gethostname(),
        machine(),
        int(os.environ.get("LOCAL_RANK", "0")),
        os.environ.get(LAUNCH_ID),
        {"python": platform.python_version(), **versions()},
        (code_hash(), code_hash(Path(__file__).parent.parent)),
        recipe.model_dump(mode="json"),
    )


def gather_rank_facts(recipe: Recipe) -> list[RankFacts]:
    """The facts of every rank, in their order; every rank takes part."""
    found: list[RankFacts | None] = [None] * dist.get_world_size()
    dist.all_gather_object(found, own_facts(recipe))
    return found


def check_ranks_agree(ranks: Sequence[RankFacts], nodes: int | None) -> None:
    """Raises UserError where a rank differs from the first, or the ranks are not on as many nodes as run.nodes says."""
    first = ranks[0]
    for number, rank in enumerate(ranks):
        where = f"rank {number} on {rank.host}"
        if rank.launch != first.launch:
            raise UserError(
                f"{where} is of another launch than rank 0 on {first.host}: one of them was left behind by an earlier "
                "run; end its processes, or give this launch a port of its own (master_port=N)"
            )
        for package, wanted in first.versions.items():
            if rank.versions.get(package) != wanted:
                raise UserError(
                    f"{where} has {package} {rank.versions.get(package)}, rank 0 on {first.host} has {wanted}; install "
                    "the same versions on every node (bash launch/install.sh)"
                )
        if rank.code != first.code:
            raise UserError(
                f"{where} runs other code of this trainer than rank 0 on {first.host}; bring every node to the same "
                "commit"
            )
        for key, wanted, found in differences(first.recipe, rank.recipe):
            raise UserError(
                f"{where} has {key}={found!r}, rank 0 on {first.host} has {wanted!r}; give every node the same recipe"
            )
    by_node = _by_node(ranks)
    if nodes is not None and len(by_node) != nodes:
        raise UserError(
            f"run.nodes={nodes}, and the ranks are on {len(by_node)}: {_listed(by_node)}; give the launcher a hostfile "
            "that is there and lists every node, or correct run.nodes"
        )


def describe(ranks: Sequence[RankFacts], seconds: float) -> str:
    """A line for a person. seconds: that the ranks took to meet."""
    by_node = _by_node(ranks)
    place = f"{len(ranks)} on {len(by_node)} node{'s' if len(by_node) > 1 else ''}: {_listed(by_node)}"
    found = ranks[0].versions
    versions = ", ".join(f"{name} {found[name]}" for name in ("python", "torch", "deepspeed"))
    return f"ranks           {place}; {interface()}; met in {seconds:.1f} s; {versions}"


def interface() -> str:
    """The network interface by which this rank reaches the first."""
    for variable in ("NCCL_SOCKET_IFNAME", "GLOO_SOCKET_IFNAME"):
        if os.environ.get(variable):
            return os.environ[variable]
    return interface_to(os.environ.get("MASTER_ADDR", "127.0.0.1")) or "no interface"


def _by_node(ranks: Sequence[RankFacts]) -> Counter[tuple[str, str]]:
    """Ranks on each node, by (machine, host)."""
    return Counter((rank.machine, rank.host) for rank in ranks)


def _listed(by_node: Counter[tuple[str, str]]) -> str:
    return ", ".join(f"{host} ({count})" for (_, host), count in by_node.items())
