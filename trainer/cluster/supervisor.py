"""What `teamlora launch` runs: starts ranks here or on a hostfile's nodes, watches them, restarts them after faults.

A fault ends a launch everywhere: the other ranks notice within run.collective_timeout, and whatever has not ended by
itself `Launch.grace` later is killed.
"""

import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from types import FrameType

from data_prep.user_error import UserError
from trainer.cluster.hostfile import Node, read_hostfile
from trainer.cluster.launch_environment import forwarded_variables
from trainer.cluster.launch_options import LaunchOptions, parse_launch_options
from trainer.cluster.launch_outcome import Outcome
from trainer.cluster.local_ranks import LocalRanks, launcher_command, slots_here
from trainer.cluster.preflight import check_launch
from trainer.cluster.remote_ranks import ConnectedNodes, RemoteRanks
from trainer.cluster.ssh import launch_folder
from trainer.distributed.network import free_port
from trainer.recipe import Recipe
from trainer.recipe_file import load_recipe
from trainer.run.launch_protocol import AGAIN, FAULT, INTERRUPTED, LAUNCH_ID, MISTAKE, STOPPED
from trainer.run.resources import PROGRAM

POLL_EVERY = 0.2  # seconds
NODE_WAIT, NODE_WAIT_POLL = 60.0, 5.0  # seconds: how long, and how often, a restart asks nodes that do not answer


class TooFewNodes(UserError):
    """Fewer nodes than `min_nodes` answer."""


class StopRequest:
    """Signals received so far: a request to save and end or, by a second Ctrl-C, to end at once."""

    def __init__(self) -> None:
        self.signal: signal.Signals | None = None  # to pass on to the ranks
        self.at_once = False
        handled = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # ignored under nohup
            handled.add(signal.SIGHUP)
        for number in handled:
            signal.signal(number, self._record)

    def _record(self, number: int, _frame: FrameType | None) -> None:
        self.at_once = number == signal.SIGINT and self.signal is not None
        self.signal = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM


@dataclass(frozen=True)
class Launch:
    """How ranks are started, each time."""

    options: LaunchOptions
    recipe: Recipe
    nodes: tuple[Node, ...]  # empty: this machine
    again: bool = False  # after a fault
    id: str = field(default_factory=lambda: secrets.token_hex(8))

    @property
    def silence(self) -> float:
        """Seconds after which a node that sends nothing counts as lost."""
        return self.recipe.run.collective_timeout

    @property
    def grace(self) -> float:
        """Seconds that the other ranks have to end once one has failed."""
        return min(60.0, 0.4 * self.silence)

    def run(self, stop: StopRequest) -> Outcome:
        """Starts the ranks once and waits until all have ended. Raises TooFewNodes."""
        ranks = self._on_nodes() if self.nodes else self._here()
        while ranks.poll():
            if stop.at_once:
                ranks.kill_after(0)
            elif stop.signal is not None:
                ranks.request_stop(stop.signal)
            time.sleep(POLL_EVERY)
        return Outcome(INTERRUPTED) if stop.at_once else ranks.outcome()

    def _here(self) -> LocalRanks:
        slots = {"localhost": slots_here(self.options.num_gpus)}
        port = self.options.master_port or free_port()
        command = launcher_command(slots, 0, "127.0.0.1", port, rank_command(self.options.arguments))
        return LocalRanks(command, {**os.environ, **self._own_variables()}, self.grace)

    def _own_variables(self) -> dict[str, str]:
        return {LAUNCH_ID: f"{self.id}.{secrets.token_hex(4)}", **({AGAIN: "1"} if self.again else {})}

    def _on_nodes(self) -> RemoteRanks:
        reached = ConnectedNodes(self.nodes, self.silence, self.grace)
        least = self.options.min_nodes or len(self.nodes)
        if (found := len(reached.nodes)) < least:
            absent = "; ".join(f"{name}: {reason}" for name, reason in reached.absent.items())
            reached.keep_first(0, "not needed")
            raise TooFewNodes(
                f"{found} of {len(self.nodes)} nodes answer, and min_nodes={least}: {absent}; see `teamlora check`, or "
                "lower min_nodes"
            )
        if reached.absent:
            count = dividing_nodes([remote.node for remote in reached.nodes], least, self.recipe)
            reached.keep_first(
                count,
                f"train.global_batch_size={self.recipe.train.global_batch_size}, experts.parallel_size="
                f"{self.recipe.experts.parallel_size}, base.shard_group={self.recipe.base.shard_group} or "
                f"adapter.shard_group={self.recipe.adapter.shard_group} cannot be divided with its ranks",
            )
        for name, reason in reached.absent.items():
            print(f"launch          without {name}: {reason}", flush=True)
        folder = launch_folder()
        variables = {**forwarded_variables(os.environ, folder), **self._own_variables()}
        command = rank_command([*self.options.arguments, f"run.nodes={len(reached.nodes)}"])
        return RemoteRanks(reached, command, variables, folder, self.options.master_port)


def rank_command(arguments: Sequence[str]) -> list[str]:
    """The Python program of one rank and its arguments, for DeepSpeed's launcher. arguments: recipe and overrides."""
    return [str(PROGRAM), "train", *arguments]


def launch(words: Sequence[str]) -> int:
    """Launches a recipe, and again after each fault up to `retries` times; returns the exit status.

    words: recipe, options of the launch and values of the recipe, as `bash launch/train.sh` takes them. Every start
    continues from the last good checkpoint. Raises UserError.
    """
    if os.environ.get("RANK"):
        rank = os.environ["RANK"]
        raise UserError(f"RANK={rank}: expected no launcher around a launch; use `teamlora train`, or unset RANK")
    options = parse_launch_options(words)
    recipe = load_recipe(options.recipe, options.overrides)
    nodes = read_hostfile(options.hostfile) if options.hostfile is not None else ()
    if options.min_nodes is not None and options.min_nodes > len(nodes):
        raise UserError(f"min_nodes={options.min_nodes}: {options.hostfile} lists {len(nodes)}; lower it or add nodes")
    if nodes and options.check:
        check(options, nodes)
    return _run_with_retries(Launch(options, recipe, nodes), StopRequest())


def _run_with_retries(launch: Launch, stop: StopRequest) -> int:
    retries, retry = launch.options.retries, 0
    while True:
        found = launch.run(stop) if retry == 0 else run_again(replace(launch, again=True), stop)
        if found.cause:
            print(f"launch          failed on {found.cause}", file=sys.stderr, flush=True)
        if found.status in (0, MISTAKE, STOPPED) or stop.signal is not None or retry == retries:
            return found.status
        retry += 1
        again = f"starting again, retry {retry} of {retries}"
        print(f"launch          ended with status {found.status}; {again}", flush=True)


def run_again(launch: Launch, stop: StopRequest) -> Outcome:
    """Starts once more after a fault. Nodes have NODE_WAIT seconds to answer; too few of them is now a fault."""
    deadline = time.monotonic() + NODE_WAIT
    while True:
        try:
            return launch.run(stop)
        except TooFewNodes as error:
            if stop.signal is not None:
                return Outcome(STOPPED)
            if time.monotonic() > deadline:
                return Outcome(FAULT, str(error))
            print(f"launch          waiting for nodes: {error}", flush=True)
            time.sleep(NODE_WAIT_POLL)


def dividing_nodes(nodes: Sequence[Node], least: int, recipe: Recipe) -> int:
    """The largest number of leading nodes, at least `least`, whose ranks divide the batch and can be grouped.

    All of them if there is none: the ranks then refuse and say what would fit.
    """
    batch, rows = recipe.train.global_batch_size, recipe.train.micro_batch_size
    groups = [group for group in (recipe.base.shard_group, recipe.adapter.shard_group) if isinstance(group, int)]
    divisor = math.lcm(recipe.experts.parallel_size, *groups)
    for count in range(len(nodes), least - 1, -1):
        ranks = sum(node.slots for node in nodes[:count])
        if batch % (rows * ranks) == 0 and ranks % divisor == 0:
            return count
    return len(nodes)


def check(options: LaunchOptions, nodes: Sequence[Node]) -> None:
    """Prints the report of `teamlora check`. Raises UserError for errors, except on nodes that may be left out."""
    report = check_launch(options.recipe, options.overrides, nodes, options.master_port)
    absent = {finding.host for finding in report.errors if finding.what == "reached"}
    spared = absent if options.min_nodes is not None and len(nodes) - len(absent) >= options.min_nodes else set()
    errors = [finding for finding in report.errors if finding.host not in spared]
    print(report if report.errors or report.warnings else f"check           {report.summary}", flush=True)
    if errors:
        raise UserError("nothing was started: fix the errors above, see docs/launching.md; check=false starts anyway")
