"""Two nodes on this one machine: network namespaces joined by a link. Needs root and the Debian package iproute2."""

import contextlib
import os
import shutil
import subprocess
import uuid
from collections.abc import Iterator
from pathlib import Path

LINK = "link0"
ADDRESS = "10.77.0.1"  # of the first node


def why_not() -> str | None:
    """Why this machine cannot have two nodes, or None where it can."""
    if os.geteuid() != 0 or shutil.which("ip") is None or shutil.which("tc") is None:
        return "two nodes need root and the Debian package iproute2"
    return None


@contextlib.contextmanager
def nodes(count: int) -> Iterator[list[str]]:
    """Names of `count` (1 or 2) network namespaces; two are joined by a link, as 10.77.0.1 and 10.77.0.2."""
    names = [f"benchmark-{uuid.uuid4().hex[:8]}" for _ in range(count)]
    try:
        for name in names:
            _ip("netns", "add", name)
            _ip("-n", name, "link", "set", "lo", "up")
        if count == 2:
            _ip("-n", names[0], "link", "add", LINK, "type", "veth", "peer", "name", LINK, "netns", names[1])
            for i, name in enumerate(names):
                _ip("-n", name, "addr", "add", f"10.77.0.{i + 1}/24", "dev", LINK)
                _ip("-n", name, "link", "set", LINK, "mtu", "65000", "up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "delete", name], check=False, capture_output=True)


def within(names: list[str], rank: int, ranks_per_node: int) -> list[str]:
    """Words before a rank's command, which run it in its node."""
    place = [f"GLOO_SOCKET_IFNAME={LINK if len(names) > 1 else 'lo'}", f"LOCAL_RANK={rank % ranks_per_node}"]
    return ["ip", "netns", "exec", names[rank // ranks_per_node], "env", *place]


def limit_link(rate: str | None) -> None:
    """Lets no more leave this process's node than `rate` (as tc writes it, 200mbit); None: all."""
    limit = ["tbf", "rate", rate, "burst", "512kb", "latency", "100ms"] if rate is not None else ["noqueue"]
    subprocess.run(["tc", "qdisc", "replace", "dev", LINK, "root", *limit], check=True)


def sent_over_link() -> int:
    """Bytes that have left this process's node."""
    lines = Path("/proc/self/net/dev").read_text().splitlines()
    (counters,) = [line.partition(":")[2].split() for line in lines if line.strip().startswith(f"{LINK}:")]
    return int(counters[8])


def _ip(*arguments: str) -> None:
    subprocess.run(["ip", *arguments], check=True)
