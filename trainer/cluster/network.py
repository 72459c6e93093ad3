"""Addresses and ports of this machine, as other machines see them."""

import os
import socket

import psutil


def free_port() -> int:
    """A port that nothing listens at. Fresh for each launch: at a usual one a rank of another run may answer."""
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]


def interface_to(address: str) -> str:
    """The network interface by which this machine reaches `address`; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect((address, 9))
            own = probe.getsockname()[0]
        except OSError:
            return "no interface"
    for name, addresses in psutil.net_if_addrs().items():
        if any(found.address == own for found in addresses):
            return name
    return own


def reached_at() -> str:
    """An address of this machine for other machines: that at which ssh reached it, or its first that is no loopback."""
    connection = os.environ.get("SSH_CONNECTION", "").split()  # client, its port, server, its port
    if len(connection) == 4 and not connection[2].startswith("127."):
        return connection[2]
    addresses = [
        found.address for each in psutil.net_if_addrs().values() for found in each if found.family == socket.AF_INET
    ]
    return next((address for address in addresses if not address.startswith("127.")), "127.0.0.1")
