"""The ranks of a launch on several nodes: one agent per node over ssh, watched, and ended together in bounded time."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from trainer.cluster.hostfile import Node
from trainer.cluster.launch_outcome import Outcome, RankEnding, outcome
from trainer.cluster.local_ranks import launcher_command
from trainer.cluster.node_agent import HEARTBEAT_EVERY
from trainer.cluster.ssh import CONNECT_TIMEOUT, allow_many_files, parse_json, ssh_command
from trainer.run.launch_protocol import FAULT, MISTAKE, STOPPED, Ending

HELLO_TIMEOUT = CONNECT_TIMEOUT + 5  # seconds
REPORT_TIMEOUT = 5.0  # seconds that a node has to report after it has killed its ranks

_Inbox = queue.SimpleQueue[tuple["RemoteNode", dict[str, Any] | None]]


class RemoteNode:
    """The agent of one node behind ssh. Its messages go to `inbox` as (node, message); message is None at the end."""

    def __init__(self, node: Node, silence: float, grace: float, inbox: _Inbox) -> None:
        self.node = node
        self.hello: dict[str, Any] = {}
        self.ended: dict[str, Any] | None = None
        self.lost = ""  # the reason if it is lost
        self.last_heard = time.monotonic()
        self._errors: list[str] = []
        pipe = subprocess.PIPE
        self._ssh = subprocess.Popen(
            ssh_command(node.name, "trainer.cluster.node_agent", [str(silence), str(grace)], silence),
            stdin=pipe, stdout=pipe, stderr=pipe, encoding="utf-8", errors="replace",
            start_new_session=True,  # so that a Ctrl-C at the terminal reaches this process only
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    @property
    def done(self) -> bool:
        return self.ended is not None or bool(self.lost)

    def send(self, **message: Any) -> None:
        assert self._ssh.stdin is not None
        try:
            self._ssh.stdin.write(json.dumps(message) + "\n")
            self._ssh.stdin.flush()
        except OSError:  # ssh has ended, which the reader reports
            pass

    def give_up(self, reason: str) -> None:
        """Marks the node as lost and ends ssh: if the agent is still there, it then ends its ranks."""
        self.lost = reason
        self._ssh.kill()

    def last_error(self) -> str:
        """The last line that ssh or the node's shell printed."""
        self._reader.join(1)
        return self._errors[-1] if self._errors else f"ssh ended with status {self._ssh.poll()}"

    def _read(self, inbox: _Inbox) -> None:
        stdout, stderr = self._ssh.stdout, self._ssh.stderr
        assert stdout is not None and stderr is not None
        errors = threading.Thread(target=self._collect_errors, args=(stderr,), daemon=True)
        errors.start()
        for line in stdout:
            message = parse_json(line)
            if isinstance(message, dict):
                inbox.put((self, message))
            else:  # printed by a login shell's profile
                self._errors.append(line.strip())
        errors.join()
        self._ssh.wait()
        inbox.put((self, None))

    def _collect_errors(self, stderr: IO[str]) -> None:
        self._errors.extend(map(str.strip, stderr))


class ConnectedNodes:
    """Connects to nodes, some of which may not answer. silence, grace: seconds, as in trainer.cluster.node_agent.

    nodes: those that answered. absent: {name: reason} of the others.
    """

    def __init__(self, nodes: Sequence[Node], silence: float, grace: float) -> None:
        self.inbox: _Inbox = queue.SimpleQueue()
        self.silence, self.grace = silence, grace
        allow_many_files()
        everyone = [RemoteNode(node, silence, grace, self.inbox) for node in nodes]
        self._wait_for_hellos(everyone)
        self.nodes = [node for node in everyone if not node.lost]
        self.absent = {node.node.name: node.lost for node in everyone if node.lost}

    def keep_first(self, count: int, reason: str) -> None:
        """Disconnects all nodes but the first `count`, before ranks are started; `reason` is noted in `absent`."""
        for node in self.nodes[count:]:
            node.give_up(reason)
            self.absent[node.node.name] = reason
        del self.nodes[count:]

    def _wait_for_hellos(self, nodes: Sequence[RemoteNode]) -> None:
        last_heartbeat = time.monotonic()
        give_up_at = last_heartbeat + HELLO_TIMEOUT
        while waiting := [node for node in nodes if not node.hello and not node.lost]:
            if time.monotonic() > give_up_at:
                for node in waiting:
                    node.give_up(f"no answer in {HELLO_TIMEOUT} s")
            if time.monotonic() > last_heartbeat + HEARTBEAT_EVERY:  # for nodes that have answered already
                last_heartbeat = time.monotonic()
                for node in nodes:
                    node.send()
            try:
                node, message = self.inbox.get(timeout=HEARTBEAT_EVERY)
            except queue.Empty:
                continue
            if message is None:
                node.lost = node.lost or node.last_error()
            else:
                node.hello = message.get("hello", node.hello)


class RemoteRanks:
    """One start of ranks on connected nodes, with the same interface as LocalRanks.

    arguments: the script and its arguments. environment: of all ranks. folder: where they run. master_port: None for a
    free one on the first node.
    """

    def __init__(
        self,
        connected: ConnectedNodes,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        master_port: int | None = None,
    ) -> None:
        self._inbox, self._silence, self._grace = connected.inbox, connected.silence, connected.grace
        self._nodes = connected.nodes
        self._endings: list[tuple[str, RankEnding]] = []
        self._stop_signal: signal.Signals | None = None
        self._last_heartbeat = 0.0
        first = self._nodes[0].hello
        slots = {remote.node.name: list(range(remote.node.slots)) for remote in self._nodes}
        for number, remote in enumerate(self._nodes):
            command = launcher_command(slots, number, first["address"], master_port or first["port"], arguments)
            remote.last_heard = time.monotonic()
            remote.send(start={"command": command, "environment": dict(environment), "folder": str(folder)})

    def request_stop(self, number: signal.Signals) -> None:
        """Has the signal sent to every rank, which saves and ends. The first signal counts."""
        if self._stop_signal is None:
            self._stop_signal = number
            self._send_to_all(stop=int(number))

    def kill_after(self, seconds: float) -> None:
        """Has what is left after so many seconds killed, and waits little longer for a silent node."""
        self._silence = min(self._silence, seconds + REPORT_TIMEOUT)
        self._send_to_all(kill_after=seconds)

    def poll(self) -> bool:
        """Returns whether ranks are left on any node. Also handles messages and heartbeats: must be called often."""
        while not self._inbox.empty():
            self._handle(*self._inbox.get())
        now = time.monotonic()
        if now - self._last_heartbeat > HEARTBEAT_EVERY:
            self._last_heartbeat = now
            self._send_to_all()
        for remote in self._nodes:
            if not remote.done and now - remote.last_heard > self._silence:
                remote.give_up(f"no answer for {self._silence:g} s: the node or the connection to it is lost")
                self._end_others()
        return not all(remote.done for remote in self._nodes)

    def outcome(self) -> Outcome:
        """The outcome once no rank is left."""
        launchers = [remote.ended["launcher"] for remote in self._nodes if remote.ended is not None]
        of_ranks = outcome(self._endings, launchers, stopping=self._stop_signal is not None)
        lost = next((f"{remote.node.name}: {remote.lost}" for remote in self._nodes if remote.lost), None)
        if lost is None or of_ranks.status == MISTAKE:
            return of_ranks
        return Outcome(STOPPED if self._stop_signal is not None else FAULT, lost)

    def _handle(self, remote: RemoteNode, message: dict[str, Any] | None) -> None:
        remote.last_heard = time.monotonic()
        if message is None:
            if not remote.done:
                remote.lost = f"the connection ended: {remote.last_error()}"
                self._end_others()
        elif "ended" in message:
            self._handle_end(remote, message["ended"])
        else:
            for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
                if name in message:
                    print(f"{remote.node.name}: {message[name]}", file=stream, flush=True)

    def _handle_end(self, remote: RemoteNode, ended: dict[str, Any]) -> None:
        remote.ended = ended
        ranks = [RankEnding(each["rank"], Ending(**each["ending"]), each["stuck"]) for each in ended["ranks"]]
        if ended["launcher"] != 0 or any(rank.ending.status != 0 for rank in ranks):
            self.kill_after(self._grace)
        self._endings.extend((f"{remote.node.name}, ", rank) for rank in ranks)

    def _end_others(self) -> None:
        """After a node is lost: the ranks of the others save and end if they can, and are killed soon if not."""
        self._send_to_all(stop=int(signal.SIGTERM))
        self.kill_after(self._silence + self._grace)

    def _send_to_all(self, **message: Any) -> None:
        for remote in self._nodes:
            if not remote.done:
                remote.send(**message)
