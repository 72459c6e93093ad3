"""Addresses and ports of this machine, as other machines see them."""

import ipaddress
import os
import random
import socket
from contextlib import suppress
from pathlib import Path

import psutil

OUTSIDE = "192.0.2.1"  # of no machine (RFC 5737)
PORTS = range(10000, 32768)  # below those that kernels hand out to connections


def free_port() -> int:
    """A port at which nothing listens. Each launch takes a fresh one: at a fixed one another run may answer."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


def machine() -> str:
    """The same text on the same machine only. Containers share a kernel, and differ in their network or name."""
    known = [socket.gethostname()]
    with suppress(OSError):  # sandboxes that show neither
        known += [
            Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip(),
            os.readlink("/proc/self/ns/net"),
        ]
    return " ".join(known)


def interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches `address`, None where none is known; nothing is sent."""
    own = _address_towards(address)
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == own for found in addresses):
            return name
    return None


def reached_at() -> str:
    """An address of this machine for other machines, no loopback: that at which ssh reached it, that on its route out
    (no bridge of containers), or its first, link-local ones last.
    """
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client, its port, server, its port
    if len(connection) == 4 and not _parsed(connection[2]).is_loopback:
        return connection[2]
    of_all = (found for each in psutil.net_if_addrs().values() for found in each if found.family == socket.AF_INET)
    addresses = [_address_towards(OUTSIDE), *(found.address for found in of_all)]
    outer = [address for address in addresses if address is not None and not _parsed(address).is_loopback]
    return min(outer, key=lambda address: _parsed(address).is_link_local, default="127.0.0.1")  # of equals the first


def _address_towards(address: str) -> str | None:
    """This machine's own on the route there, None where there is none; nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            return probe.getsockname()[0]
    except OSError:
        return None


def _parsed(address: str) -> ipaddress.IPv4Address | ipaddress.IPv6Address:
    return ipaddress.ip_address(address.partition("%")[0])
