"""The `teamlora` command: a table from command to options and function."""

import argparse
import errno
import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from data_prep.terminal_text import without_control_codes
from data_prep.user_error import UserError
from trainer.console import options as options_of
from trainer.console.library_logs import silence_libraries
from trainer.console.streams import survive_closed_streams
from trainer.console.utf8_mode import restart_in_utf8_mode
from trainer.errors import LostRank, OwnFault, Stopped, TrainingFault
from trainer.run.crash import record_crashes
from trainer.run.gpu import RankWithoutGpu, configure_allocator, out_of_memory
from trainer.run.launch_protocol import FAULT, INTERRUPTED, MISTAKE, STOPPED, Ending, write_ending
from trainer.run.stop_signal import StopSignal
from trainer.run.user_home import ensure_home

if TYPE_CHECKING:
    from trainer.recipe import Recipe

# A disk, or a limit of this machine, as opposed to a path that is wrong.
MACHINE_FAILS = (errno.EIO, errno.ENOSPC, errno.EDQUOT, errno.ESTALE, errno.EMFILE, errno.ENFILE)

EXAMPLE = """\
example:
  teamlora recipes quickstart > my.yaml
  teamlora prepare my.yaml
  teamlora launch my.yaml

`teamlora COMMAND --help` explains a command."""


@dataclass(frozen=True)
class Command:
    """A subcommand. example: lines that follow `teamlora NAME `, for the end of its --help."""

    name: str
    run: Callable[[argparse.Namespace], int | None]  # may return an exit status
    add_options: Callable[[argparse.ArgumentParser], None]
    help: str
    example: tuple[str, ...]
    notes: str = ""

    def add_to(self, commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
        lines = [f"  teamlora {self.name} {words}".rstrip() for words in self.example]
        title = "example:" if len(lines) == 1 else "examples:"
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=f"{self.help[0].upper()}{self.help[1:]}.",
            epilog="\n".join([*([self.notes, ""] if self.notes else []), title, *lines]),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_options(parser)
        parser.set_defaults(run=self.run)


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status. A user's mistake is one line, on the first rank of each machine,
    unless only another rank can tell.

    arguments: None for those of this process, which is then the command's own.
    """
    if arguments is None:
        restart_in_utf8_mode()
    record_crashes()
    with survive_closed_streams():
        try:
            ending = _run(_parse(arguments))
        except BaseException as error:  # printed by Python as a traceback, or by argparse as usage
            status = MISTAKE if isinstance(error, SystemExit) else FAULT
            write_ending(Ending(status, " ".join(f"{type(error).__name__}: {error}".split())))
            raise
    write_ending(ending)
    return ending.status


def _run(options: argparse.Namespace) -> Ending:
    ensure_home()
    silence_libraries()
    configure_allocator()
    try:
        status = options.run(options)
    except (UserError, TrainingFault) as error:
        alone = isinstance(error, (OwnFault, RankWithoutGpu))  # else every rank has met it
        if alone or os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = MISTAKE if isinstance(error, UserError) else FAULT
        return Ending(status, str(error), followed=isinstance(error, LostRank))
    except (RuntimeError, OSError) as error:
        found = _fault_of_machine(error)
        if found is None:
            raise
        line = f"rank {os.environ['RANK']}: {found}" if "RANK" in os.environ else found
        print(f"error: {line}", file=sys.stderr, flush=True)  # on each rank: others need not have met it
        return Ending(FAULT, line)
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        return Ending(STOPPED, str(stopped))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Ending(INTERRUPTED, "interrupted")
    return Ending(status or 0)


def _fault_of_machine(error: RuntimeError | OSError) -> str | None:
    """One line for a full disk, exhausted memory and the like; None for other errors, which need a traceback."""
    if isinstance(error, RuntimeError):
        return out_of_memory(error)
    if error.errno not in MACHINE_FAILS:
        return None
    return f"{error.filename or 'this process'}: {error.strerror}; mend that and start again: nothing saved is lost"


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; key.path=value may stand anywhere after the recipe, also behind an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="teamlora",
        description="Multi-task fine-tuning with TeamLoRA experts.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action=_PrintVersion, nargs=0, help="print version and commit, and exit")
    parser.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # inserted by DeepSpeed's launcher
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for command in COMMANDS:
        command.add_to(commands)
    return parser


class _PrintVersion(argparse.Action):
    def __call__(self, parser: argparse.ArgumentParser, *_: object) -> None:
        from trainer.run.provenance import commit, package_version

        print(f"teamlora {package_version() or '(not installed)'}, commit {commit() or 'unknown'}")
        parser.exit()


def _recipe(options: argparse.Namespace) -> "Recipe":
    from trainer.recipe_file import (
        load_recipe,  # imported here, so that a rank handles signals after 0.03 s, not 0.15 s
    )

    return load_recipe(options.recipe, options.overrides)


def _prepare(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from data_prep.fingerprint import tokenizer_files
    from data_prep.prepare import find_unchanged_set, prepare
    from trainer.base.model_folder import resolve_folder

    files = tokenizer_files(resolve_folder(recipe.base), recipe.data)
    report = find_unchanged_set(recipe.data, files)
    if report is None or options.show:  # a tokenizer takes seconds to load
        from trainer.base.model_config import load_tokenizer

        tokenizer = load_tokenizer(recipe.base, recipe.data.chat_template)
        report = report or prepare(recipe.data, tokenizer, files)
    print(report)
    if options.show:
        from data_prep.show import show

        show(report.directory, tokenizer, options.show)


def _train(options: argparse.Namespace) -> None:
    stop = StopSignal()  # before all else: imports take seconds, during which a scheduler may send a signal
    try:
        recipe = _recipe(options)
        from trainer.training.train import train

        train(recipe, stop)
    finally:
        stop.ignore()


def _launch(options: argparse.Namespace) -> int:
    from trainer.cluster.supervisor import launch

    return launch(options.words)


def _estimate(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from trainer.estimate.estimate_report import Machines, place_ranks, report
    from trainer.estimate.step_time import hardware

    ranks = place_ranks(options.world_size, options.nodes, options.gpus_per_node)
    speeds = hardware(options.gpu, options.tflops, options.link)
    device = options.gpu_memory or (speeds.memory if speeds is not None else None)
    report(recipe, Machines(*ranks, device, options.host_memory, speeds), options.json)


def _check(options: argparse.Namespace) -> None:
    from trainer.cluster.hostfile import read_hostfile
    from trainer.cluster.preflight import LIMIT, check_launch
    from trainer.cluster.preflight_facts import counted

    nodes = read_hostfile(options.hostfile) if options.hostfile is not None else None
    report = check_launch(options.recipe, options.overrides, nodes, options.master_port, options.limit or LIMIT)
    print(json.dumps(report.as_dict()) if options.json else report, flush=True)
    if report.errors:
        raise UserError(f"the check found {counted(len(report.errors), 'error')}; fix what it reports on stdout")


def _evaluate(options: argparse.Namespace) -> None:
    from trainer.evaluation.evaluate import EvaluateRequest, evaluate

    sizes = options.items_per_task, options.batch_size
    found = evaluate(EvaluateRequest(options.directory, options.recipe, options.against, *sizes, options.deepspeed))
    if found is not None:  # on rank 0
        print(found.as_json() if options.json else found, flush=True)


def _generate(options: argparse.Namespace) -> None:
    from trainer.evaluation.generation import answer
    from trainer.evaluation.loaded_models import load_run

    found = answer(load_run(options.directory), options.prompt, options.max_new_tokens)
    print(without_control_codes(found))


def _router(options: argparse.Namespace) -> None:
    from trainer.analysis.router_analysis import show_routers

    print(show_routers(options.directory, options.items_per_task, options.examples, options.to))


def _export(options: argparse.Namespace) -> None:
    from trainer.export.export import ExportRequest, export

    asked = (options.output, options.task, options.rows, options.items_per_task, options.base)
    print(export(ExportRequest(options.directory, options.to, *asked)))


def _recipes(options: argparse.Namespace) -> None:
    from data_prep.tables import text_table
    from trainer.run.resources import recipe_description, recipe_path, recipes

    if options.name is not None:
        print(recipe_path(options.name).read_text(encoding="utf-8"), end="")
    else:
        rows = [(name, recipe_description(path)) for name, path in recipes().items()]
        print(text_table(("recipe", "what it trains"), rows, left=(0, 1)))


def _experts(options: argparse.Namespace) -> None:
    from trainer.analysis.expert_editing import change_experts, list_experts

    if options.keep is None and options.add is None:
        print(list_experts(options.directory))
    else:
        print(change_experts(options.directory, options.keep, options.add or 0, options.to))


COMMANDS = (
    Command(
        "prepare", _prepare, options_of.prepare, "make the prepared set that a recipe trains on",
        ("my.yaml --show 3",),
    ),
    Command(
        "train", _train, options_of.train, "train a recipe in one process, or as one rank under a launcher",
        ("my.yaml", "my.yaml run.name=short train.steps=100"),
    ),
    Command(
        "launch", _launch, options_of.launch, "train a recipe on all GPUs of this machine or on several nodes",
        ("my.yaml", "num_gpus=2 retries=3 my.yaml train.steps=100", "hostfile=hosts min_nodes=7 my.yaml"),
        options_of.LAUNCH_NOTES,
    ),
    Command(
        "estimate", _estimate, options_of.estimate, "predict memory and traffic of a run before it is launched",
        ("my.yaml --world-size 8 --gpu-memory 24GiB",),
    ),
    Command(
        "check", _check, options_of.check, "look for mistakes on all nodes before a launch",
        ("my.yaml --hostfile hosts",),
    ),
    Command(
        "evaluate", _evaluate, options_of.evaluate,
        "score a run by task on held-out items, against the base and other runs; alone or under a launcher",
        ("runs/quickstart --against base,runs/other",),
    ),
    Command(
        "generate", _generate, options_of.generate, "answer a prompt with a finished run's model",
        ("runs/quickstart --prompt 'What is 3 + 4?'",),
    ),
    Command(
        "router", _router, options_of.router, "show what a run's routers do, by layer, task and token",
        ("runs/quickstart",),
    ),
    Command(
        "export", _export, options_of.export,
        "write a run's adapter for other tools, and measure what the change costs",
        ("runs/quickstart --to lora", "runs/quickstart --to merged --output merged"),
    ),
    Command(
        "recipes", _recipes, options_of.recipes, "list the recipes of this package, or print one",
        ("", "quickstart > my.yaml"),
    ),
    Command(
        "experts", _experts, options_of.experts, "list a run's experts, or write its adapter with fewer or more",
        ("runs/quickstart", "runs/quickstart --keep 0,2"),
    ),
)  # fmt: skip
