"""How a command of this trainer is started on another machine: the same interpreter and code, over ssh by key."""

import math
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent.parent
CONNECT = 10  # seconds to reach a node's sshd


def ssh_command(host: str, module: str, arguments: Sequence[str] = (), silence: float = CONNECT) -> list[str]:
    """A local command that runs `python -m module arguments` on `host`, in the checkout there.

    It asks no question: without a key it ends. Where the host falls silent ssh ends too, with status 255 and within
    about `silence` seconds, of which ssh alone would never know.
    """
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT,
        "ServerAliveInterval": max(1, math.ceil(silence / 3)),
        "ServerAliveCountMax": 3,
        "ForwardX11": "no",
        "ControlMaster": "no",  # a shared connection's process would outlive the command and keep its output open
    }
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    remote = shlex.join([sys.executable, "-m", module, *arguments])
    # by way of trainer/, so that an empty folder in place of the checkout is told as one
    entered = f"cd {shlex.quote(str(REPOSITORY / 'trainer'))} && cd .. && exec {remote}"
    return ["ssh", *settings, host, entered]
