"""Two training hosts and a launching host on this one machine: Linux namespaces, a bridge, real ssh and pdsh.

Each host has its own network, name, mounts, processes and shared memory, its own home and /etc/hosts, and an sshd that
takes keys only. All other folders are those of this machine, so the hosts share them. The bridge is the launching
host's: nothing is changed outside of the namespaces, and they end with the process that made them, however it ends.
"""

import os
import pwd
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

PROGRAMS = ("sshd", "ssh", "ssh-keygen", "pdsh", "ip", "unshare", "nsenter", "setpriv", "mount", "hostname", "timeout")
PACKAGES = "openssh-server openssh-client pdsh iproute2 procps"
NODES = ("node-a", "node-b")
ALIAS = "node-z"  # node-a's second name
SYSTEM_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
HOME = pwd.getpwuid(0).pw_dir
UNSHARE = ("unshare", "--net", "--uts", "--mount", "--pid", "--ipc", "--fork", "--kill-child", "--mount-proc")
# With /run in memory the home's changes stay there, and a daemon's files do not meet those of this machine.
MOUNTS = """set -eu
mount -t tmpfs tmpfs /run
mount -t tmpfs tmpfs /dev/shm
mkdir /run/sshd /run/upper /run/work
mount -t overlay overlay -o "lowerdir=$HOME,upperdir=/run/upper,workdir=/run/work" "$HOME"
ip link set lo up
"""
PROBE = f"{MOUNTS} ip link add switch type bridge; ip link add port type veth peer name eth0"
BEGIN = f"""{MOUNTS}
hostname "$1"
sed "1a 127.0.1.1 $1" "$2/hosts" > /run/hosts  # as Debian's installer has it: a trap for gloo
mount --bind /run/hosts /etc/hosts
mkdir -p "$HOME/.ssh"
mount -t tmpfs -o mode=700 tmpfs "$HOME/.ssh"
cp "$2/config" "$2/key" "$HOME/.ssh"
exec "$3" -D -f "$2/sshd_config" -E "$2/$1.log"
"""
SSHD_CONFIG = """Port 22
HostKey {folder}/key
AuthorizedKeysFile {folder}/key.pub
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
StrictModes no
UsePAM no
UseDNS no
PidFile none
SetEnv PATH={path} PYTHONDONTWRITEBYTECODE=1
"""
# Debian's pdsh waits for a node that no longer answers for as long as ssh does.
SSH_CONFIG = f"""IdentityFile {HOME}/.ssh/key
StrictHostKeyChecking no
UserKnownHostsFile /dev/null
LogLevel ERROR
ConnectTimeout 5
ServerAliveInterval 3
ServerAliveCountMax 3
"""


@dataclass(frozen=True)
class Host:
    """A host by its name and its first process, an sshd, by the id that it has on this machine."""

    name: str
    init: int

    def begin(
        self, *command: str, folder: Path = Path("/"), env: Mapping[str, str] | None = None, timeout: float = 30
    ) -> subprocess.Popen:
        """Starts a command there; after `timeout` seconds it and its children are killed, and the status is not 0."""
        entered = ["nsenter", f"--target={self.init}", "--mount", "--uts", "--ipc", "--net", "--pid"]
        limited = ["timeout", "--signal=KILL", str(timeout), "env", f"--chdir={folder}", *command]
        env = {**(os.environ if env is None else env), "HOME": HOME}
        pipe = subprocess.PIPE
        return subprocess.Popen(
            [*entered, *limited], env=env, stdin=subprocess.DEVNULL, stdout=pipe, stderr=pipe, text=True
        )

    def run(self, *command: str, **options: Any) -> subprocess.CompletedProcess:
        """Begins a command with these options, and waits for its end."""
        return ended(self.begin(*command, **options))

    def processes(self) -> list[psutil.Process]:
        """Those that run there, but for ssh's daemon and its sessions."""
        here, found = _process_namespace(self.init), []
        for process in psutil.process_iter():
            try:
                ours = _process_namespace(process.pid) == here and process.status() != psutil.STATUS_ZOMBIE
                if ours and not process.name().startswith("sshd"):
                    found.append(process)
            except (OSError, psutil.Error):  # it has ended
                continue
        return found

    def ranks(self) -> dict[int, psutil.Process]:
        """{rank: its process}, to be stopped or killed by a test."""
        found: dict[int, psutil.Process] = {}
        for process in self.processes():
            with suppress(psutil.Error):  # it has ended
                rank = process.environ().get("RANK")
                if rank is not None:
                    found.setdefault(int(rank), process)
        return found

    @contextmanager
    def replaced(self, path: Path, text: str, folder: Path) -> Iterator[None]:
        """This host alone sees `text` in the file at `path`, which all hosts share; it is kept in `folder`."""
        other = folder / f"{self.name}-{path.name}"
        other.write_text(text)
        _checked(self.run("mount", "--bind", str(other), str(path)))
        try:
            yield
        finally:
            _checked(self.run("umount", str(path)))


@dataclass(frozen=True)
class Cluster:
    """The launching host and the nodes by their names."""

    launcher: Host
    nodes: dict[str, Host]

    @contextmanager
    def cut_off(self, node: str) -> Iterator[None]:
        """The node's link is down, as by an unplugged cable, and up again after the context."""
        _checked(self.launcher.run("ip", "link", "set", node, "down"))
        try:
            yield
        finally:
            _checked(self.launcher.run("ip", "link", "set", node, "up"))

    def processes(self) -> list[psutil.Process]:
        """Those of all hosts, but for ssh's daemons and their sessions."""
        return [process for host in (self.launcher, *self.nodes.values()) for process in host.processes()]

    def wait_until_idle(self, seconds: float = 60) -> list[list[str]]:
        """The commands that still run on any host when the time is over: none as soon as there are none."""
        ending = time.monotonic() + seconds
        while (left := self.processes()) and time.monotonic() < ending:
            time.sleep(0.1)
        return [process.cmdline() for process in left if process.is_running()]

    def clear(self) -> None:
        """Kills what a test has left on any host."""
        for process in self.processes():
            process.kill()


def ended(begun: subprocess.Popen) -> subprocess.CompletedProcess:
    """What came of a command that was begun, once it has ended."""
    stdout, stderr = begun.communicate()
    return subprocess.CompletedProcess(begun.args, begun.returncode, stdout, stderr)


def why_not() -> str | None:
    """Why hosts cannot be emulated on this machine, or None where they can."""
    if sys.platform != "linux" or os.geteuid() != 0:
        return "emulated hosts need Linux and root"
    absent = [name for name in PROGRAMS if shutil.which(name, path=SYSTEM_PATH) is None]
    if absent:
        return f"emulated hosts need {', '.join(absent)} (Debian packages {PACKAGES})"
    tried = subprocess.run([*UNSHARE, "sh", "-c", PROBE], env=_environment(), capture_output=True, text=True)
    return f"emulated hosts are refused here: {tried.stderr.strip()}" if tried.returncode != 0 else None


@contextmanager
def emulated(folder: Path) -> Iterator[Cluster]:
    """The hosts, while the context lasts; `folder` holds their settings, keys and logs."""
    names = ("launcher", *NODES)
    _write_settings(folder, names)
    with ExitStack() as running:
        launcher, *nodes = (running.enter_context(_host(name, folder)) for name in names)
        _checked(launcher.run("ip", "link", "add", "switch", "type", "bridge"))
        _checked(launcher.run("ip", "address", "add", f"{_address(0)}/24", "dev", "switch"))
        _checked(launcher.run("ip", "link", "set", "switch", "up"))
        for number, node in enumerate(nodes, start=1):
            pair = f"ip link add {node.name} type veth peer name eth0 netns {node.init}"
            # of the launcher's network alone: the id of the node's process is this machine's
            _checked(_run("nsenter", f"--target={launcher.init}", "--net", *pair.split()))
            _checked(launcher.run("ip", "link", "set", node.name, "master", "switch", "up"))
            _checked(node.run("ip", "address", "add", f"{_address(number)}/24", "dev", "eth0"))
            _checked(node.run("ip", "link", "set", "eth0", "up"))
        yield Cluster(launcher, {node.name: node for node in nodes})


@contextmanager
def _host(name: str, folder: Path) -> Iterator[Host]:
    sshd = shutil.which("sshd", path=SYSTEM_PATH)
    # setpriv: the kernel kills unshare with this process, unshare's child with unshare, and the rest with that child
    begin = ["setpriv", "--pdeathsig=KILL", *UNSHARE, "sh", "-c", BEGIN, "sh", name, str(folder), sshd]
    log = folder / f"{name}.log"
    with log.open("w") as output, subprocess.Popen(begin, env=_environment(), stdout=output, stderr=output) as holder:
        try:
            ending = time.monotonic() + 20
            while "Server listening" not in log.read_text():
                if holder.poll() is not None or time.monotonic() > ending:
                    raise RuntimeError(f"the emulated host {name} did not start: {log.read_text()}")
                time.sleep(0.02)
            (init,) = psutil.Process(holder.pid).children()
            yield Host(name, init.pid)
        finally:
            holder.kill()  # and so, by the kernel, all processes of the host, and its interfaces and mounts with them


def _write_settings(folder: Path, names: tuple[str, ...]) -> None:
    programs = folder / "programs"
    programs.mkdir()
    # DeepSpeed's launcher, when signalled, has every node run pkill with a pattern that fits other runs too
    stub = programs / "pkill"
    stub.write_text(f'#!/bin/sh\necho "$(hostname) $*" >> {folder}/pkill.log\n')
    stub.chmod(0o755)
    path = f"{programs}:{Path(sys.executable).parent}:{SYSTEM_PATH}"
    (folder / "sshd_config").write_text(SSHD_CONFIG.format(folder=folder, path=path))
    (folder / "config").write_text(SSH_CONFIG)
    lines = ["127.0.0.1 localhost", *(f"{_address(number)} {name}" for number, name in enumerate(names))]
    (folder / "hosts").write_text("\n".join([*lines, f"{_address(1)} {ALIAS}"]) + "\n")
    _checked(_run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / "key")))


def _address(number: int) -> str:
    return f"198.51.100.{number + 1}"  # a net that is reserved for documentation: RFC 5737


def _environment() -> dict[str, str]:
    return {"PATH": SYSTEM_PATH, "HOME": HOME}


def _run(*command: str) -> subprocess.CompletedProcess:
    return subprocess.run(command, env=_environment(), capture_output=True, text=True, timeout=30)


def _checked(done: subprocess.CompletedProcess) -> None:
    if done.returncode != 0:
        raise RuntimeError(f"{' '.join(done.args)}: {done.stderr.strip() or done.returncode}")


def _process_namespace(process: int) -> str:
    return os.readlink(f"/proc/{process}/ns/pid")
