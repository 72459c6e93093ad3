"""Starts commands of this trainer on other machines, over ssh by key: same interpreter path, same checkout path."""

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
from trainer.run.resources import PACKAGE_ROOT

CONNECT_TIMEOUT = 10  # seconds to reach a node's sshd


def launch_folder() -> Path:
    """The current folder by the name under which the shell entered it, with symbolic links kept as in PACKAGE_ROOT."""
    named = os.environ.get("PWD", "")
    same = os.path.isabs(named) and os.path.exists(named) and os.path.samefile(named, os.curdir)
    return Path(named) if same else Path.cwd()


def ssh_command(host: str, module: str, arguments: Sequence[str] = (), silence: float = CONNECT_TIMEOUT) -> list[str]:
    """Builds a local command that runs `python -m module arguments` on `host`, in the checkout there.

    It never prompts: without a key it fails. If the host falls silent, ssh exits with status 255 within about `silence`
    seconds; by default it would not notice. Raises UserError if this machine has no ssh.
    """
    if shutil.which("ssh") is None:
        raise UserError(f"{host}: this machine has no ssh to reach it; install it (openssh-client)")
    options = {
        "BatchMode": "yes",
        "ConnectTimeout": CONNECT_TIMEOUT,
        "ServerAliveInterval": max(1, math.ceil(silence / 3)),
        "ServerAliveCountMax": 3,
        "ForwardX11": "no",
        "ControlMaster": "no",  # a shared connection's process would outlive the command and keep its output open
    }
    settings = [word for name, value in options.items() for word in ("-o", f"{name}={value}")]
    remote = shlex.join([sys.executable, "-m", module, *arguments])
    # by way of trainer/, so that an empty folder in place of the checkout fails as a missing checkout
    entered = f"cd {shlex.quote(str(PACKAGE_ROOT / 'trainer'))} && cd .. && exec {remote}"
    return ["ssh", *settings, host, entered]


def allow_many_files() -> None:
    """Raises this process's limit of open files to its maximum: pipes to hundreds of nodes exceed the usual 1024."""
    most = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def parse_json(line: str) -> Any:
    """The value of a line of JSON; None if it is not JSON."""
    try:
        return json.loads(line)
    except ValueError:
        return None
