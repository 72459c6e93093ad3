"""Command-line options of each `teamlora` subcommand."""

import argparse

from trainer.console.arguments import indices, link_speed, memory_size, names, path, port, positive_float, positive_int

LAUNCH_NOTES = """\
options of the launch, as key=value:
  num_gpus=N        GPUs of this machine to use, or CPU ranks without a GPU; default: all GPUs, or one CPU rank
  hostfile=F        launch on several nodes: a file with a line `name slots=N` per node, one rank per slot
  min_nodes=N       start without nodes that do not answer, if N or more do; default: all of the hostfile
  check=false       start on several nodes without the checks of `teamlora check`
  master_port=N     port where rank 0 listens; default: any free port
  retries=N         restart after a fault, at most N times, from the last good checkpoint; default: 0

On SIGTERM, SIGUSR1 or Ctrl-C every rank saves and ends with exit status 75; the same command continues from there."""


def recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument("recipe", type=path, metavar="RECIPE", help="a YAML recipe; `teamlora recipes` has some")
    command.add_argument("overrides", nargs="*", metavar="key.path=value", help="replaces a value of the recipe")


def prepare(command: argparse.ArgumentParser) -> None:
    recipe(command)
    command.add_argument("--show", type=positive_int, metavar="N", help="print N rows with the learned tokens in color")


def train(command: argparse.ArgumentParser) -> None:
    recipe(command)
    command.add_argument("--local_rank", type=int, help=argparse.SUPPRESS)  # DeepSpeed's launcher, after train.sh


def launch(command: argparse.ArgumentParser) -> None:
    words = "the recipe, options of the launch, and key.path=value to replace values of the recipe"
    command.add_argument("words", nargs="+", metavar="RECIPE | key=value", help=words)


def estimate(command: argparse.ArgumentParser) -> None:
    recipe(command)
    command.add_argument("--world-size", type=positive_int, metavar="N", help="ranks of the run; default: 1")
    command.add_argument("--nodes", type=positive_int, metavar="N", help="machines they are on; default: 1")
    command.add_argument("--gpus-per-node", type=positive_int, metavar="N", help="ranks on each machine")
    command.add_argument("--gpu", metavar="NAME", help="expect times and memory of these, such as h100, a100 or 4090")
    command.add_argument(
        "--tflops", type=positive_float, metavar="X", help="what a GPU reaches; default: 40 %% of its peak"
    )
    command.add_argument("--link", type=link_speed, metavar="RATE", help="between machines, such as 400Gbit or 25Gbit")
    command.add_argument("--gpu-memory", type=memory_size, metavar="SIZE", help="per GPU, such as 24GiB or 80GB")
    command.add_argument("--host-memory", type=memory_size, metavar="SIZE", help="of the host, each rank's share of it")
    command.add_argument("--json", action="store_true", help="print one JSON object, sizes in bytes")


def check(command: argparse.ArgumentParser) -> None:
    recipe(command)
    command.add_argument("--hostfile", type=path, metavar="F", help="nodes of the launch; default: this machine")
    command.add_argument("--master-port", type=port, metavar="N", help="where rank 0 listens; default: any free port")
    command.add_argument("--limit", type=positive_int, metavar="SECONDS", help="for the memory estimate; default: 12")
    command.add_argument("--json", action="store_true", help="print one JSON object")


def run(command: argparse.ArgumentParser) -> None:
    command.add_argument("directory", type=path, metavar="RUN", help="directory of a finished run")


def evaluate(command: argparse.ArgumentParser) -> None:
    run(command)
    against = "baselines: base, other runs or adapter folders, or none; default: base"
    command.add_argument("--against", type=names, default=["base"], metavar="base,RUN2", help=against)
    command.add_argument("--items-per-task", type=positive_int, default=100, metavar="N", help="default: 100")
    command.add_argument("--batch-size", type=positive_int, default=32, metavar="N", help="default: 32")
    command.add_argument("--recipe", type=path, help="names base and data when RUN is an adapter folder")
    sharded = "a ZeRO-3 configuration, for a base too large for one rank: ds_configs/zero3.json"
    command.add_argument("--deepspeed", type=path, metavar="FILE", help=sharded)
    command.add_argument("--json", action="store_true", help="print evaluation.json instead of the table")


def generate(command: argparse.ArgumentParser) -> None:
    run(command)
    command.add_argument("--prompt", required=True, help="the user's turn")
    command.add_argument("--max-new-tokens", type=positive_int, default=128, metavar="N", help="default: 128")


def router(command: argparse.ArgumentParser) -> None:
    run(command)
    command.add_argument("--items-per-task", type=positive_int, default=25, metavar="N", help="documents; default: 25")
    command.add_argument("--examples", type=positive_int, default=8, metavar="N", help="in tokens.html; default: 8")
    command.add_argument("--to", type=path, metavar="FOLDER", help="default: router/ in the run")


def export(command: argparse.ArgumentParser) -> None:
    run(command)
    forms = "peft: unchanged; lora: for plain PEFT, gates fixed at their mean; merged: that, added to the base"
    command.add_argument("--to", choices=("peft", "lora", "merged"), required=True, help=forms)
    command.add_argument("--output", type=path, metavar="FOLDER", help="default: export-lora and the like in the run")
    command.add_argument("--task", metavar="NAME", help="mean gates of this task only; default: of all tasks")
    rows = "rows for the mean gates and the fidelity report; default: 64"
    command.add_argument("--rows", type=positive_int, default=64, metavar="N", help=rows)
    items = "items scored for the fidelity report; default: 20"
    command.add_argument("--items-per-task", type=positive_int, default=20, metavar="N", help=items)
    base = "the weights that merged adds to; default: original"
    command.add_argument("--base", choices=("original", "dequantised"), help=base)


def recipes(command: argparse.ArgumentParser) -> None:
    command.add_argument("name", nargs="?", metavar="NAME", help="print this recipe; default: list all")


def experts(command: argparse.ArgumentParser) -> None:
    run(command)
    change = command.add_mutually_exclusive_group()
    change.add_argument("--keep", type=indices, metavar="I,J", help="numbers of the experts to keep; drops the others")
    change.add_argument("--add", type=positive_int, metavar="N", help="experts to add; they do not change outputs yet")
    command.add_argument("--to", type=path, metavar="FOLDER", help="default: adapter-Kexperts in the run")
