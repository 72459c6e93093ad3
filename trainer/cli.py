"""The `teamlora` command: parse, hand over, nothing else."""

import argparse
import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from data_prep.user_error import UserError
from trainer.console.library_logs import silence_libraries
from trainer.console.streams import survive_closed_streams
from trainer.distributed.network import LAST_PORT
from trainer.errors import LostRank, Stopped, TrainingFault
from trainer.estimate.sizes import parse_size
from trainer.run.launch_protocol import FAULT, INTERRUPTED, MISTAKE, STOPPED, Ending, write_ending
from trainer.run.stop_signal import StopSignal

if TYPE_CHECKING:
    from trainer.recipe import Recipe


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit status; a mistake is one line on the first rank of each machine."""
    with survive_closed_streams():
        try:
            ending = _run(_parsed(arguments))
        except BaseException as error:  # which Python tells by its traceback, and argparse by its usage
            status = MISTAKE if isinstance(error, SystemExit) else FAULT
            write_ending(Ending(status, " ".join(f"{type(error).__name__}: {error}".split())))
            raise
    write_ending(ending)
    return ending.status


def _run(options: argparse.Namespace) -> Ending:
    silence_libraries()
    try:
        options.run(options)
    except (UserError, TrainingFault) as error:
        if os.environ.get("LOCAL_RANK", "0") == "0":
            print(f"error: {error}", file=sys.stderr, flush=True)
        status = MISTAKE if isinstance(error, UserError) else FAULT
        return Ending(status, str(error), followed=isinstance(error, LostRank))
    except Stopped as stopped:
        if os.environ.get("RANK", "0") == "0":
            print(stopped, flush=True)
        return Ending(STOPPED, str(stopped))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return Ending(INTERRUPTED, "interrupted")
    return Ending(0)


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The command line; key.path=value may stand anywhere after the recipe, also behind an option."""
    parser = _parser()
    options, rest = parser.parse_known_args(arguments)
    if rest and (not hasattr(options, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        options.overrides += rest
    return options


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="teamlora", description="Multi-task fine-tuning with TeamLoRA experts.")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    prepare = commands.add_parser("prepare", help="make the prepared set that a recipe trains on")
    train = commands.add_parser("train", help="train a recipe, alone or as a rank of a launcher")
    estimate = commands.add_parser("estimate", help="tell the memory and traffic of a run before it is launched")
    check = commands.add_parser("check", help="look for mistakes on all nodes before a launch")
    for command, run in ((prepare, _prepare), (train, _train), (estimate, _estimate), (check, _check)):
        command.add_argument("recipe", type=Path, metavar="RECIPE", help="a YAML recipe, see launch/recipes/")
        command.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the recipe")
        command.set_defaults(run=run)
    prepare.add_argument("--show", type=_positive, metavar="N", help="print N rows, what is learnt of them in colour")
    estimate.add_argument("--world-size", type=_positive, default=1, metavar="N", help="ranks of the run; default: 1")
    estimate.add_argument("--gpu-memory", type=_size, metavar="SIZE", help="of a rank's device, such as 24GiB or 80GB")
    estimate.add_argument("--host-memory", type=_size, metavar="SIZE", help="of the host, a rank's share of it")
    estimate.add_argument("--json", action="store_true", help="print one JSON object, in bytes")

    check.add_argument("--hostfile", type=Path, metavar="F", help="nodes of the launch; default: this machine alone")
    check.add_argument("--master-port", type=_port, metavar="N", help="where rank 0 listens; default: any free port")
    check.add_argument("--limit", type=_positive, metavar="SECONDS", help="for the estimate of memory; default: 12")
    check.add_argument("--json", action="store_true", help="print one JSON object")

    generate = commands.add_parser("generate", help="answer a prompt with a finished run's model")
    generate.add_argument("--prompt", required=True, help="the user's turn")
    generate.add_argument("--max-new-tokens", type=_positive, default=128, metavar="N", help="default: 128")
    evaluate = commands.add_parser(
        "evaluate", help="scores by task on held-out items, against the base and other runs; alone or under a launcher"
    )
    _add_evaluate_options(evaluate)
    # what DeepSpeed's launcher adds, after launch/train.sh or before the command; LOCAL_RANK says the same
    for place in (train, parser):
        place.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)

    experts = commands.add_parser("experts", help="list a run's experts, or write its adapter with others")
    change = experts.add_mutually_exclusive_group()
    change.add_argument("--keep", type=_indices, metavar="I,J", help="experts to keep, by number; the others go")
    change.add_argument("--add", type=_positive, metavar="N", help="experts to add; they change no output yet")
    experts.add_argument("--to", type=Path, metavar="FOLDER", help="default: adapter-Kexperts in the run")
    export = commands.add_parser("export", help="write a run's adapter for other tools, and measure what that costs")
    forms = "peft: as it is; lora: for plain PEFT, gates fixed at their mean; merged: that, folded into the base"
    export.add_argument("--to", choices=("peft", "lora", "merged"), required=True, help=forms)
    export.add_argument("--output", type=Path, metavar="FOLDER", help="default: export-lora and the like in the run")
    export.add_argument("--task", metavar="NAME", help="take the gates' mean over this task alone; default: over all")
    export.add_argument("--rows", type=_positive, default=64, metavar="N", help="for mean and price; default: 64")
    export.add_argument(
        "--items-per-task", type=_positive, default=20, metavar="N", help="for the scores in the price; default: 20"
    )
    export.add_argument("--base", choices=("original", "dequantised"), help="what merged adds to; default: original")
    router = commands.add_parser("router", help="show what a run's routers do, by layer, task and token")
    router.add_argument("--items-per-task", type=_positive, default=25, metavar="N", help="documents; default: 25")
    router.add_argument("--examples", type=_positive, default=8, metavar="N", help="of tokens.html; default: 8")
    router.add_argument("--to", type=Path, metavar="FOLDER", help="default: router/ in the run")
    for command, run in (
        (generate, _generate), (evaluate, _evaluate), (experts, _experts), (export, _export), (router, _router),
    ):  # fmt: skip
        command.add_argument("directory", type=Path, metavar="RUN", help="folder of a finished run")
        command.set_defaults(run=run)
    return parser


def _add_evaluate_options(evaluate: argparse.ArgumentParser) -> None:
    evaluate.add_argument(
        "--against",
        type=_names,
        default=["base"],
        metavar="base,RUN2",
        help="baselines: base, other runs or adapters' folders, or none; default: base",
    )
    evaluate.add_argument("--items-per-task", type=_positive, default=100, metavar="N", help="default: 100")
    evaluate.add_argument("--batch-size", type=_positive, default=32, metavar="N", help="default: 32")
    evaluate.add_argument("--recipe", type=Path, help="tells base and data where RUN is an adapter's folder")
    evaluate.add_argument(
        "--deepspeed",
        type=Path,
        metavar="FILE",
        help="ZeRO-3, for a base too large for one rank: ds_configs/zero3.json",
    )
    evaluate.add_argument("--json", action="store_true", help="print evaluation.json in place of the table")


def _names(text: str) -> list[str]:
    return [] if text == "none" else [name for name in text.split(",") if name]


def _positive(text: str) -> int:
    if not text.isdecimal() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text!r} is no whole number above 0")
    return int(text)


def _port(text: str) -> int:
    if _positive(text) > LAST_PORT:
        raise argparse.ArgumentTypeError(f"{text!r} is no port; the last is {LAST_PORT}")
    return int(text)


def _size(text: str) -> int:
    try:
        return parse_size(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None


def _indices(text: str) -> list[int]:
    if not all(part.isdecimal() for part in text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is no list of numbers such as 0,2")
    return sorted({int(part) for part in text.split(",")})


def _recipe(options: argparse.Namespace) -> "Recipe":
    from trainer.recipe import (
        load_recipe,
    )  # not above: a rank that is being asked to end listens after 0.03 s, not 0.15

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
    stop = StopSignal()  # first of all: imports take seconds, in which a scheduler may ask
    try:
        recipe = _recipe(options)
        from trainer.training.train import train

        train(recipe, stop)
    finally:
        stop.ignore()


def _estimate(options: argparse.Namespace) -> None:
    recipe = _recipe(options)
    from trainer.estimate.estimate_report import report

    report(recipe, options.world_size, options.gpu_memory, options.host_memory, options.json)


def _check(options: argparse.Namespace) -> None:
    from trainer.cluster.hostfile import read_hostfile
    from trainer.cluster.preflight import LIMIT, check_launch
    from trainer.cluster.preflight_summary import counted

    nodes = read_hostfile(options.hostfile) if options.hostfile is not None else None
    report = check_launch(options.recipe, options.overrides, nodes, options.master_port, options.limit or LIMIT)
    print(json.dumps(report.as_dict()) if options.json else report, flush=True)
    if report.errors:
        raise UserError(f"the check found {counted(len(report.errors), 'error')}; correct what it tells on stdout")


def _generate(options: argparse.Namespace) -> None:
    from trainer.evaluation.generation import answer
    from trainer.evaluation.loaded_models import load_run

    print(answer(load_run(options.directory), options.prompt, options.max_new_tokens))


def _evaluate(options: argparse.Namespace) -> None:
    from trainer.evaluation.evaluate import EvaluateRequest, evaluate

    sizes = options.items_per_task, options.batch_size
    found = evaluate(EvaluateRequest(options.directory, options.recipe, options.against, *sizes, options.deepspeed))
    if found is not None:  # on the first rank
        print(found.as_json() if options.json else found, flush=True)


def _experts(options: argparse.Namespace) -> None:
    from trainer.analysis.expert_editing import change_experts, list_experts

    if options.keep is None and options.add is None:
        print(list_experts(options.directory))
    else:
        print(change_experts(options.directory, options.keep, options.add or 0, options.to))


def _export(options: argparse.Namespace) -> None:
    from trainer.export.export import Request, export

    asked = (options.output, options.task, options.rows, options.items_per_task, options.base)
    print(export(Request(options.directory, options.to, *asked)))


def _router(options: argparse.Namespace) -> None:
    from trainer.analysis.router_analysis import show_routers

    print(show_routers(options.directory, options.items_per_task, options.examples, options.to))
