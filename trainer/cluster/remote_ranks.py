"""The ranks of a launch on several nodes: an agent on each over ssh, watched, and ended together within a bound."""

import json
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from trainer.cluster.hostfile import Node
from trainer.cluster.launch_outcome import Outcome, RankEnding, outcome
from trainer.cluster.local_ranks import launcher_command
from trainer.cluster.node_agent import BEAT_EVERY
from trainer.cluster.ssh import CONNECT, allow_many_files, parsed, ssh_command
from trainer.run.launch_protocol import FAULT, MISTAKE, STOPPED, Ending

LAST_WORD = 5.0  # seconds for a node to tell what it has ended


class RemoteNode:
    """The agent of one node, at the other end of ssh. What it says comes to `inbox` as (node, message), None last."""

    def __init__(self, node: Node, silence: float, grace: float, inbox: queue.SimpleQueue) -> None:
        self.node = node
        self.hello: dict[str, Any] = {}
        self.ended: dict[str, Any] | None = None
        self.lost = ""  # why, where it is
        self.heard = time.monotonic()
        self._errors: list[str] = []
        pipe = subprocess.PIPE
        self._ssh = subprocess.Popen(
            ssh_command(node.name, "trainer.cluster.node_agent", [str(silence), str(grace)], silence),
            stdin=pipe, stdout=pipe, stderr=pipe, text=True, errors="replace",
            start_new_session=True,  # a Ctrl-C at the terminal is this process's to hand on
        )  # fmt: skip
        self._reader = threading.Thread(target=self._read, args=(inbox,), daemon=True)
        self._reader.start()

    @property
    def over(self) -> bool:
        return self.ended is not None or bool(self.lost)

    def tell(self, **message: Any) -> None:
        try:
            self._ssh.stdin.write(json.dumps(message) + "\n")
            self._ssh.stdin.flush()
        except OSError:  # ssh has ended, which its reader tells
            pass

    def give_up(self, reason: str) -> None:
        """Takes the node for lost, and ends ssh: an agent that is there after all ends its ranks then."""
        self.lost = reason
        self._ssh.kill()

    def why_silent(self) -> str:
        """What ssh, or the node's shell, said last."""
        self._reader.join(1)
        return self._errors[-1] if self._errors else f"ssh ended with status {self._ssh.poll()}"

    def _read(self, inbox: queue.SimpleQueue) -> None:
        errors = threading.Thread(target=lambda: self._errors.extend(map(str.strip, self._ssh.stderr)), daemon=True)
        errors.start()
        for line in self._ssh.stdout:
            message = parsed(line)
            if isinstance(message, dict):
                inbox.put((self, message))
            else:  # what a login shell's profile prints
                self._errors.append(line.strip())
        errors.join()
        self._ssh.wait()
        inbox.put((self, None))


class Reached:
    """Connections to nodes, of which some may not answer. silence, grace: seconds, as trainer.cluster.node_agent's."""

    def __init__(self, nodes: Sequence[Node], silence: float, grace: float) -> None:
        self.inbox: queue.SimpleQueue = queue.SimpleQueue()
        self.silence, self.grace = silence, grace
        allow_many_files()
        everyone = [RemoteNode(node, silence, grace, self.inbox) for node in nodes]
        self._wait_for_hellos(everyone)
        self.nodes = [node for node in everyone if not node.lost]
        self.absent = {node.node.name: node.lost for node in everyone if node.lost}

    def keep(self, count: int, why: str) -> None:
        """Lets the agents of all nodes but the first `count` go, which have not begun; `why` says it of each."""
        for node in self.nodes[count:]:
            node.give_up(why)
            self.absent[node.node.name] = why
        del self.nodes[count:]

    def _wait_for_hellos(self, nodes: Sequence[RemoteNode]) -> None:
        beat = time.monotonic()
        ending = beat + CONNECT + 5
        while waiting := [node for node in nodes if not node.hello and not node.lost]:
            if time.monotonic() > ending:
                for node in waiting:
                    node.give_up(f"no answer in {CONNECT + 5} s")
            if time.monotonic() > beat + BEAT_EVERY:  # for those that wait with us
                beat = time.monotonic()
                for node in nodes:
                    node.tell()
            try:
                node, message = self.inbox.get(timeout=BEAT_EVERY)
            except queue.Empty:
                continue
            if message is None:
                node.lost = node.lost or node.why_silent()
            else:
                node.hello = message.get("hello", node.hello)


class RemoteRanks:
    """One start of ranks on nodes that were reached; the same face as LocalRanks.

    arguments: the script and its arguments. environment: for all ranks. folder: where they run. master_port: None for
    one that is free on the first node.
    """

    def __init__(
        self,
        reached: Reached,
        arguments: Sequence[str],
        environment: Mapping[str, str],
        folder: Path,
        master_port: int | None = None,
    ) -> None:
        self._inbox, self._silence, self._grace = reached.inbox, reached.silence, reached.grace
        self._nodes = reached.nodes
        self._seen: list[tuple[str, RankEnding]] = []
        self._asked: signal.Signals | None = None
        self._beat = 0.0
        first = self._nodes[0].hello
        slots = {remote.node.name: list(range(remote.node.slots)) for remote in self._nodes}
        for number, remote in enumerate(self._nodes):
            command = launcher_command(slots, number, first["address"], master_port or first["port"], arguments)
            remote.heard = time.monotonic()
            remote.tell(begin={"command": command, "environment": dict(environment), "folder": str(folder)})

    def ask(self, number: signal.Signals) -> None:
        """Has every rank asked to save and end, once."""
        if self._asked is None:
            self._asked = number
            self._tell(ask=int(number))

    def end_within(self, seconds: float) -> None:
        """Has what is left after so many seconds killed; and does not wait longer for a node that says nothing."""
        self._silence = min(self._silence, seconds + LAST_WORD)
        self._tell(end_within=seconds)

    def look(self) -> bool:
        """Whether ranks are left on any node. To be called often: here messages are read and the nodes kept alive."""
        while not self._inbox.empty():
            self._take(*self._inbox.get())
        now = time.monotonic()
        if now - self._beat > BEAT_EVERY:
            self._beat = now
            self._tell()
        for remote in self._nodes:
            if not remote.over and now - remote.heard > self._silence:
                remote.give_up(f"no answer for {self._silence:g} s: the node, or the way to it, is lost")
                self._lose(remote)
        return not all(remote.over for remote in self._nodes)

    def outcome(self) -> Outcome:
        """What became of them, once none is left."""
        launchers = [remote.ended["launcher"] for remote in self._nodes if remote.ended is not None]
        found = outcome(self._seen, launchers, stopping=self._asked is not None)
        lost = next((f"{remote.node.name}: {remote.lost}" for remote in self._nodes if remote.lost), None)
        if lost is None or found.status == MISTAKE:
            return found
        return Outcome(STOPPED if self._asked is not None else FAULT, lost)

    def _take(self, remote: RemoteNode, message: dict[str, Any] | None) -> None:
        remote.heard = time.monotonic()
        if message is None:
            if not remote.over:
                remote.lost = f"the connection ended: {remote.why_silent()}"
                self._lose(remote)
        elif "ended" in message:
            self._take_end(remote, message["ended"])
        else:
            for name, stream in (("out", sys.stdout), ("err", sys.stderr)):
                if name in message:
                    print(f"{remote.node.name}: {message[name]}", file=stream, flush=True)

    def _take_end(self, remote: RemoteNode, ended: dict[str, Any]) -> None:
        remote.ended = ended
        if ended["launcher"] != 0:
            self.end_within(self._grace)
        for each in ended["ranks"]:
            found = RankEnding(each["rank"], Ending(**each["ending"]), each["stuck"])
            self._seen.append((f"{remote.node.name}, ", found))

    def _lose(self, remote: RemoteNode) -> None:
        """The others save and end if they can without it, and soon."""
        self._tell(ask=int(signal.SIGTERM))
        self.end_within(self._silence + self._grace)

    def _tell(self, **message: Any) -> None:
        for remote in self._nodes:
            if not remote.over:
                remote.tell(**message)
