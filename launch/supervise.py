"""What `bash launch/train.sh` runs: a launch here or on a hostfile's nodes, watched, and started again after faults.

A fault ends a launch everywhere: the other ranks notice within run.collective_timeout, and what has not ended of itself
`Launch.grace` later is killed.
"""

import math
import os
import secrets
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType

sys.path.insert(0, str(Path(os.path.abspath(__file__)).parent.parent))  # links kept, see trainer.cluster.ssh

from data_prep.user_error import UserError
from trainer.cluster.hostfile import Node, read_hostfile
from trainer.cluster.launch_environment import forwarded_variables
from trainer.cluster.launch_outcome import Outcome
from trainer.cluster.local_ranks import LocalRanks, launcher_command, slots_here
from trainer.cluster.preflight import check_launch
from trainer.cluster.remote_ranks import ConnectedNodes, RemoteRanks
from trainer.cluster.ssh import REPOSITORY, launch_folder
from trainer.console.streams import survive_closed_streams
from trainer.distributed.network import LAST_PORT, free_port
from trainer.recipe import Recipe, load_recipe
from trainer.run.launch_protocol import AGAIN, FAULT, INTERRUPTED, LAUNCH_ID, MISTAKE, STOPPED

SCRIPT = REPOSITORY / "launch" / "train.sh"
LOOK_EVERY = 0.2  # seconds
PATIENCE, ASK_EVERY = 60.0, 5.0  # seconds: for how long, and how often, a retry asks for nodes that do not answer


class TooFewNodes(UserError):
    """Fewer nodes than `min_nodes` answer."""


@dataclass(frozen=True)
class Options:
    """The launch's own options. arguments: the recipe's path and its overrides, which the ranks are given."""

    arguments: tuple[str, ...]
    hostfile: Path | None = None
    num_gpus: int | None = None
    master_port: int | None = None
    retries: int = 0
    min_nodes: int | None = None
    check: bool = True  # of several nodes

    @property
    def recipe(self) -> Path:
        """Its path. Raises UserError where none, or several, are given."""
        paths = [argument for argument in self.arguments if "=" not in argument]
        if len(paths) != 1:
            raise UserError(f"arguments {' '.join(paths)!r}: expected the path of one recipe; see launch/recipes/")
        return Path(paths[0])

    @property
    def overrides(self) -> list[str]:
        """The values of the recipe that are replaced."""
        return [argument for argument in self.arguments if "=" in argument]


class Stop:
    """What this process was asked by signals: to let the ranks save and end, or (the second Ctrl-C) to end at once."""

    def __init__(self) -> None:
        self.asked: signal.Signals | None = None
        self.at_once = False
        numbers = {signal.SIGTERM, signal.SIGUSR1, signal.SIGINT}
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:  # as under nohup
            numbers.add(signal.SIGHUP)
        for number in numbers:
            signal.signal(number, self._remember)

    def _remember(self, number: int, _frame: FrameType | None) -> None:
        self.at_once = number == signal.SIGINT and self.asked is not None
        self.asked = signal.SIGUSR1 if number == signal.SIGUSR1 else signal.SIGTERM


@dataclass(frozen=True)
class Launch:
    """How ranks are started, again and again."""

    options: Options
    recipe: Recipe
    nodes: tuple[Node, ...]  # none: this machine
    again: bool = False  # after a fault

    @property
    def silence(self) -> float:
        """Seconds after which a node that says nothing is taken for lost."""
        return self.recipe.run.collective_timeout

    @property
    def grace(self) -> float:
        """Seconds that ranks have to end once one has failed."""
        return min(60.0, 0.4 * self.silence)

    def run(self, stop: Stop) -> Outcome:
        """One start, to the end of every rank. Raises TooFewNodes."""
        ranks = self._on_nodes() if self.nodes else self._here()
        while ranks.poll():
            if stop.at_once:
                ranks.kill_after(0)
            elif stop.asked is not None:
                ranks.request_stop(stop.asked)
            time.sleep(LOOK_EVERY)
        return Outcome(INTERRUPTED) if stop.at_once else ranks.outcome()

    def _here(self) -> LocalRanks:
        slots = {"localhost": slots_here(self.options.num_gpus)}
        port = self.options.master_port or free_port()
        command = launcher_command(slots, 0, "127.0.0.1", port, [str(SCRIPT), *self.options.arguments])
        return LocalRanks(command, {**os.environ, **self._own_variables()}, self.grace)

    def _own_variables(self) -> dict[str, str]:
        return {LAUNCH_ID: secrets.token_hex(8), **({AGAIN: "1"} if self.again else {})}

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
            batch, experts = self.recipe.train.global_batch_size, self.recipe.experts.parallel_size
            count = dividing_nodes([remote.node for remote in reached.nodes], least, self.recipe)
            reached.keep_first(
                count, f"train.global_batch_size={batch} or experts.parallel_size={experts} does not go with its ranks"
            )
        for name, reason in reached.absent.items():
            print(f"launch          without {name}: {reason}", flush=True)
        folder = launch_folder()
        variables = {**forwarded_variables(os.environ, folder), **self._own_variables()}
        arguments = [str(SCRIPT), *self.options.arguments, f"run.nodes={len(reached.nodes)}"]
        return RemoteRanks(reached, arguments, variables, folder, self.options.master_port)


def main(arguments: Sequence[str]) -> int:
    """Launches, and again after a fault, up to `retries` times: each start goes on from the last good checkpoint."""
    options = parse_options(arguments)
    recipe = load_recipe(options.recipe, options.overrides)
    nodes = read_hostfile(options.hostfile) if options.hostfile is not None else ()
    if options.min_nodes is not None and options.min_nodes > len(nodes):
        raise UserError(f"min_nodes={options.min_nodes}: {options.hostfile} lists {len(nodes)}; lower it or add nodes")
    launch = Launch(options, recipe, nodes)
    if nodes and options.check:
        check(options, nodes)
    stop, retry = Stop(), 0
    while True:
        found = launch.run(stop) if retry == 0 else run_again(replace(launch, again=True), stop)
        if found.cause:
            print(f"launch          failed on {found.cause}", file=sys.stderr, flush=True)
        if found.status in (0, MISTAKE, STOPPED) or stop.asked is not None or retry == options.retries:
            return found.status
        retry += 1
        again = f"starting again, retry {retry} of {options.retries}"
        print(f"launch          ended with status {found.status}; {again}", flush=True)


def run_again(launch: Launch, stop: Stop) -> Outcome:
    """A start after a fault. Nodes have PATIENCE seconds to answer; that too few do is a fault then, and no mistake."""
    ending = time.monotonic() + PATIENCE
    while True:
        try:
            return launch.run(stop)
        except TooFewNodes as error:
            if stop.asked is not None:
                return Outcome(STOPPED)
            if time.monotonic() > ending:
                return Outcome(FAULT, str(error))
            print(f"launch          waiting for nodes: {error}", flush=True)
            time.sleep(ASK_EVERY)


def dividing_nodes(nodes: Sequence[Node], least: int, recipe: Recipe) -> int:
    """The largest number of first nodes, `least` or more, over whose ranks batch and placed experts can be cut.

    All of them where there is none: then the ranks refuse, and say what would do.
    """
    batch, rows = recipe.train.global_batch_size, recipe.train.micro_batch_size
    for count in range(len(nodes), least - 1, -1):
        ranks = sum(node.slots for node in nodes[:count])
        if batch % (rows * ranks) == 0 and ranks % recipe.experts.parallel_size == 0:
            return count
    return len(nodes)


def check(options: Options, nodes: Sequence[Node]) -> None:
    """Shows what `teamlora check` finds. Raises UserError for errors, but for those of nodes that may be left out."""
    report = check_launch(options.recipe, options.overrides, nodes, options.master_port)
    absent = {finding.host for finding in report.errors if finding.what == "reached"}
    spared = absent if options.min_nodes is not None and len(nodes) - len(absent) >= options.min_nodes else set()
    errors = [finding for finding in report.errors if finding.host not in spared]
    print(report if report.errors or report.warnings else f"check           {report.summary}", flush=True)
    if errors:
        raise UserError("nothing was started: mend the errors above, see launch/CLUSTER.md; check=false starts anyway")


def parse_options(arguments: Sequence[str]) -> Options:
    """The launch's own options among the arguments, key=value. Raises UserError for a bad one."""
    found, passed = {}, []
    for argument in arguments:
        key, _, value = argument.partition("=")
        if key in ("num_gpus", "min_nodes"):
            found[key] = _number(key, value, least=1)
        elif key == "master_port":
            found[key] = _number(key, value, least=1, most=LAST_PORT)
        elif key == "retries":
            found[key] = _number(key, value, least=0)
        elif key == "hostfile":
            found[key] = Path(value)
        elif key == "check":
            found[key] = _truth(key, value)
        else:
            passed.append(argument)
    if "hostfile" in found and "num_gpus" in found:
        raise UserError(f"num_gpus={found['num_gpus']}: with a hostfile its slots say it; remove num_gpus")
    if "min_nodes" in found and "hostfile" not in found:
        raise UserError(f"min_nodes={found['min_nodes']}: needs hostfile=FILE; give it, or remove min_nodes")
    return Options(tuple(passed), **found)


def _number(key: str, value: str, least: int, most: float = math.inf) -> int:
    if not value.isdecimal() or not least <= int(value) <= most:
        expected = f"of at least {least}" if most == math.inf else f"from {least} to {most}"
        raise UserError(f"{key}={value}: expected a whole number {expected}; change it")
    return int(value)


def _truth(key: str, value: str) -> bool:
    if value not in ("true", "false"):
        raise UserError(f"{key}={value}: expected true or false; change it")
    return value == "true"


if __name__ == "__main__":
    with survive_closed_streams():
        try:
            sys.exit(main(sys.argv[1:]))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            sys.exit(MISTAKE)
        except KeyboardInterrupt:  # before there were ranks to ask
            sys.exit(INTERRUPTED)
