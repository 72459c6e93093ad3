"""How a command of this trainer is started on another machine: the same interpreter and code, over ssh by key."""

import json
import math
import os
import resource
import shlex
import shutil
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from data_prep.user_error import UserError

# Links are kept: on another machine the path may be there, and what a link here leads to may not.
REPOSITORY = Path(os.path.abspath(__file__)).parent.parent.parent
CONNECT = 10  # seconds to reach a node's sshd


def launch_folder() -> Path:
    """The current folder by the name under which the shell entered it, links kept as in REPOSITORY."""
    named = os.environ.get("PWD", "")
    same = os.path.isabs(named) and os.path.exists(named) and os.path.samefile(named, os.curdir)
    return Path(named) if same else Path.cwd()


def ssh_command(host: str, module: str, arguments: Sequence[str] = (), silence: float = CONNECT) -> list[str]:
    """A local command that runs `python -m module arguments` on `host`, in the checkout there.

    It asks no question: without a key it ends. Where the host falls silent ssh ends too, with status 255 and within
    about `silence` seconds, of which ssh alone would never know. Raises UserError where this machine has no ssh.
    """
    if shutil.which("ssh") is None:
        raise UserError(f"{host}: this machine has no ssh to reach it by; install it (openssh-client)")
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


def allow_many_files() -> None:
    """Lets this process open as many files as it may: pipes to hundreds of nodes are more than the usual 1024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parsed(line: str) -> Any:
    """What a line of JSON holds; None where it is none."""
    try:
        return json.loads(line)
    except ValueError:
        return None
