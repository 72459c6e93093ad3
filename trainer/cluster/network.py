"""Addresses and ports of this machine, as other machines see them."""

import ipaddress
import os
import random
import socket

import psutil

LAST_PORT = 65535
PORTS = range(10000, 32768)  # below those that kernels hand out to connections


def free_port() -> int:
    """A port that nothing listens at. Fresh for each launch: at a usual one a rank of another run may answer."""
    while True:
        port = random.SystemRandom().choice(PORTS)
        with socket.socket() as probe:
            try:
                probe.bind(("", port))
                return port
            except OSError:
                continue


def interface_to(address: str) -> str | None:
    """The network interface by which this machine reaches `address`, None where none is known; nothing is sent."""
    try:
        family, kind, _, _, place = socket.getaddrinfo(address, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(place)
            own = probe.getsockname()[0]
    except OSError:
        return None
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address.partition("%")[0] == own for found in addresses):
            return name
    return None


def reached_at() -> str:
    """An address of this machine for other machines: that at which ssh reached it, or its first that is no loopback."""
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client, its port, server, its port
    if len(connection) == 4 and not _is_loopback(connection[2]):
        return connection[2]
    addresses = [
        found.address for each in psutil.net_if_addrs().values() for found in each if found.family == socket.AF_INET
    ]
    return next((address for address in addresses if not _is_loopback(address)), "127.0.0.1")


def _is_loopback(address: str) -> bool:
    return ipaddress.ip_address(address.partition("%")[0]).is_loopback
