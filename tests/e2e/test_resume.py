"""Runs that are stopped, killed or robbed of their disk, by the real commands; and how they go on."""

import functools
import os
import shutil
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.support.workplace import SCRIPT, ZERO3, ranks_of, wait_for_steps

pytestmark = pytest.mark.slow

STEPS = 150
LIMIT = 60  # seconds from a signal to the end of every process
NUMBERS = ("step", "loss", "grad_norm", "learning_rate", "router_weight")
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="mounts a file system: needs root")


class Launched:
    """One `bash launch/train.sh` of a run in the background. unread: what it prints goes to a reader that has gone."""

    def __init__(self, workplace, run: str, *more: str, unread: bool = False) -> None:
        self.run, self.directory = run, workplace.folder / "runs" / run
        self.log = workplace.folder / f"{run}.log"
        changes = [f"run.name={run}", f"train.steps={STEPS}", "train.eval_every=50", "checkpoint.save_every=30", ZERO3]
        with self.log.open("a") as log:
            to = subprocess.PIPE if unread else log
            self.process = subprocess.Popen(
                ["bash", SCRIPT, "num_gpus=2", "recipe.yaml", *changes, *more],
                cwd=workplace.folder, env=workplace.environment(), stdout=to, stderr=to,
            )  # fmt: skip
        if unread:
            self.process.stdout.close()
            self.process.stderr.close()

    def status(self, limit: float = 900) -> int:
        return self.process.wait(limit)

    def come_to(self, step: int) -> None:
        wait_for_steps(self.directory / "metrics.jsonl", step)

    def said(self) -> str:
        return self.log.read_text()


@pytest.fixture(scope="module")
def unbroken(workplace):
    """Gives the run, in a dtype, that nothing happened to."""

    @functools.cache
    def run(dtype: str = "fp32") -> Launched:
        launched = Launched(workplace, f"unbroken-{dtype}", f"base.dtype={dtype}")
        assert launched.status() == 0, launched.said()
        return launched

    return run


def assert_equal_runs(workplace, found: Launched, expected: Launched) -> None:
    """The same numbers at each step, once each, and the same adapter, bit for bit; TensorBoard shows the same."""
    numbers = [[[r[key] for key in NUMBERS] for r in workplace.records(run.run)] for run in (found, expected)]
    assert [step for step, *_ in numbers[0]] == list(range(1, STEPS + 1))
    assert numbers[0] == numbers[1]
    adapters = [load_file(run.directory / "adapter" / "adapter_model.safetensors") for run in (found, expected)]
    assert all(torch.equal(adapters[0][name], tensor) for name, tensor in adapters[1].items())
    events = EventAccumulator(str(found.directory / "tensorboard"), {"scalars": 0}).Reload()
    assert [event.step for event in events.Scalars("train/loss")] == list(range(1, STEPS + 1))


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_stopped_twice_a_run_ends_as_the_unbroken_one(workplace, unbroken, dtype):
    name = f"stopped-{dtype}"
    for step, rank, number in ((40, 1, signal.SIGTERM), (100, 0, signal.SIGUSR1)):
        run = Launched(workplace, name, f"base.dtype={dtype}")
        run.come_to(step)
        os.kill(ranks_of(name)[rank], number)
        assert run.status(LIMIT) == 75, run.said()
        assert not ranks_of(name)
    run = Launched(workplace, name, f"base.dtype={dtype}")
    assert run.status() == 0, run.said()
    assert run.said().count("as a signal asked") == 2
    assert_equal_runs(workplace, run, unbroken(dtype))


def process(run: Launched, words: str) -> int:
    """The process of a launch whose command line holds `words`."""
    for child in psutil.Process(run.process.pid).children(recursive=True):
        if words in " ".join(child.cmdline()):
            return child.pid
    raise AssertionError(f"no process of the launch has {words!r}")


SIGNALLED: dict[str, tuple[signal.Signals, Callable[[Launched], list[int]]]] = {
    "all ranks": (signal.SIGTERM, lambda run: list(ranks_of(run.run).values())),
    "train.sh": (signal.SIGTERM, lambda run: [run.process.pid]),
    "train.sh | tee, Ctrl-C": (signal.SIGINT, lambda run: [run.process.pid]),
    "DeepSpeed's launcher": (signal.SIGTERM, lambda run: [process(run, "deepspeed.launcher.launch")]),
}


@pytest.mark.parametrize("whom", SIGNALLED)
def test_a_signal_to_any_process_saves_and_ends_all_with_75(workplace, whom):
    number, find = SIGNALLED[whom]
    run = Launched(workplace, "signalled-" + "".join(filter(str.isalpha, whom)), unread="tee" in whom)
    run.come_to(10)
    for pid in find(run):
        os.kill(pid, number)
    assert run.status(LIMIT) == 75, run.said()
    assert not ranks_of(run.run)
    done = len(workplace.records(run.run))
    assert (run.directory / "checkpoints" / f"step-{done:06d}" / "index.json").is_file()


def test_a_signal_before_the_first_step_ends_it_with_75_and_the_next_start_begins(workplace):
    run = Launched(workplace, "early")
    while not ranks_of("early"):
        time.sleep(0.05)
    time.sleep(2)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status(2 * LIMIT) == 75, run.said()
    assert not ranks_of("early")


def test_retries_start_again_from_the_last_checkpoint_after_a_kill(workplace, unbroken):
    run = Launched(workplace, "killed", "retries=2", "train.resume=never")
    for step in (70, 115):
        run.come_to(step)
        os.kill(ranks_of(run.run)[step % 2], signal.SIGKILL)
        while ranks_of(run.run):
            time.sleep(0.2)
    assert run.status() == 0, run.said()
    assert run.said().count("starting again") == 2
    assert_equal_runs(workplace, run, unbroken())


def test_a_halted_rank_ends_the_launch_in_the_set_time_with_operation_and_rank_named(workplace):
    run = Launched(workplace, "halted", "run.collective_timeout=5")
    run.come_to(10)
    os.kill(ranks_of("halted")[1], signal.SIGSTOP)
    assert run.status(LIMIT) == 1, run.said()
    assert "does not answer in " in run.said()
    assert "launch          failed on rank 1: was suspended (SIGSTOP or a debugger), and was killed" in run.said()
    assert not ranks_of("halted")


@contextmanager
def covered(folder: Path, *options: str) -> Iterator[None]:
    """Another file system over a folder for a while."""
    subprocess.run(["mount", "-t", "tmpfs", *options, "none", str(folder)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


def full(folder: Path):
    return covered(folder, "-o", "size=64k")


def read_only(folder: Path):
    return covered(folder, "-o", "ro")


@contextmanager
def gone(folder: Path) -> Iterator[None]:
    """A file in the folder's place."""
    aside = folder.with_name("aside")
    folder.rename(aside)
    folder.touch()
    try:
        yield
    finally:
        folder.unlink()
        aside.rename(folder)


@pytest.mark.parametrize("trouble", [pytest.param(full, marks=as_root), pytest.param(read_only, marks=as_root), gone])
def test_a_disk_that_fails_while_saving_ends_nothing_and_costs_no_checkpoint(workplace, trouble):
    run = Launched(workplace, f"disk-{trouble.__name__}", "checkpoint.save_every=10")
    run.come_to(25)
    checkpoints = run.directory / "checkpoints"
    with trouble(checkpoints):
        ending = time.monotonic() + 30
        while "was not saved" not in run.said():
            assert time.monotonic() < ending, run.said()
            time.sleep(0.1)
        before = len(workplace.records(run.run))
    run.come_to(before + 15)
    assert run.status() == 0, run.said()
    assert (checkpoints / "latest").read_text() == f"step-{STEPS:06d}\n"
    assert len(workplace.records(run.run)) == STEPS


def test_a_disk_that_is_full_at_the_end_is_told_in_one_line_and_the_same_command_finishes(workplace):
    command = ["teamlora", "train", "recipe.yaml", "run.name=no-room", "train.steps=3", "report.tensorboard=false"]
    done = workplace.run("bash", "-c", 'ulimit -f 8; exec "$@"', "bash", *command)
    assert done.returncode == 1
    assert "error: all steps are done, and runs/no-room/adapter cannot be written (" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (workplace.folder / "runs/no-room/adapter").exists()
    assert workplace.run(*command).returncode == 0
    assert (workplace.folder / "runs/no-room/adapter/adapter_model.safetensors").is_file()


def test_a_damaged_checkpoint_is_passed_over_for_the_one_before_with_a_warning(workplace, unbroken):
    run = Launched(workplace, "damaged")
    run.come_to(70)
    os.kill(run.process.pid, signal.SIGTERM)
    assert run.status(LIMIT) == 75
    newest = run.directory / "checkpoints" / (run.directory / "checkpoints" / "latest").read_text().strip()
    state = newest / "state-00001.safetensors"
    spoilt = bytearray(state.read_bytes())
    spoilt[-1] ^= 1
    state.write_bytes(spoilt)
    run = Launched(workplace, "damaged")
    assert run.status() == 0, run.said()
    assert f"{newest.name} is skipped: state-00001.safetensors is not what was written" in run.said()
    assert_equal_runs(workplace, run, unbroken())


@pytest.fixture(scope="module")
def unfinished(workplace) -> Path:
    """A run of one process that was stopped."""
    run = subprocess.Popen(
        ["teamlora", "train", "recipe.yaml", "run.name=unfinished", "train.steps=4000"],
        cwd=workplace.folder, env=workplace.environment(), stdout=subprocess.DEVNULL,
    )  # fmt: skip
    wait_for_steps(workplace.folder / "runs" / "unfinished" / "metrics.jsonl", 20)
    run.terminate()
    assert run.wait(LIMIT) == 75
    return workplace.folder / "runs" / "unfinished"


def test_a_changed_recipe_is_refused_by_name_and_harmless_changes_are_told(workplace, unfinished):
    again = ["train", "recipe.yaml", "run.name=unfinished", "train.steps=4000"]
    refused = workplace.teamlora(*again, "adapter.alpha=9", "train.learning_rate=1")
    assert refused.returncode == 2
    assert "adapter.alpha was 8.0 and is 9.0; train.learning_rate was 0.001 and is 1.0" in refused.stderr
    never = workplace.teamlora(*again, "train.resume=never")
    assert never.returncode == 2
    assert "holds an unfinished run" in never.stderr
    elsewhere = ["train", "recipe.yaml", "run.name=elsewhere", "train.steps=4000", f"train.resume={unfinished}"]
    assert workplace.teamlora(*elsewhere, "run.seed=7").returncode == 2
    missing = workplace.teamlora(*again, "train.resume=nowhere")
    assert missing.returncode == 2
    assert "train.resume=nowhere: no intact checkpoint there" in missing.stderr


def test_another_run_can_go_on_from_a_checkpoint_with_another_micro_batch(workplace, unfinished):
    steps = len(workplace.records("unfinished")) + 3
    shutil.copytree(unfinished, workplace.folder / "kept")
    run = subprocess.Popen(
        ["teamlora", "train", "recipe.yaml", "run.name=fork", "train.steps=4000", "train.micro_batch_size=2",
         "train.resume=kept"],
        cwd=workplace.folder, env=workplace.environment(), stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    wait_for_steps(workplace.folder / "runs" / "fork" / "metrics.jsonl", 3)
    run.terminate()
    said, _ = run.communicate(timeout=LIMIT)
    assert run.returncode == 75
    assert "changed         train.micro_batch_size was 1 and is 2" in said
    assert [record["step"] for record in workplace.records("fork")][:3] == list(range(steps - 2, steps + 1))


def test_early_stopping_ends_a_run_whose_held_out_loss_no_longer_falls_and_keeps_the_best(workplace):
    done = workplace.teamlora(
        "train", "recipe.yaml", "run.name=patient", "train.steps=500", "train.eval_every=2", "train.learning_rate=0.3",
        "train.early_stopping_patience=3", "checkpoint.save_every=0", "train.warmup_ratio=0",
        "checkpoint.load_best_at_end=true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    losses = {r["step"]: r["held_out_loss"] for r in workplace.records("patient") if "held_out_loss" in r}
    best = min(losses, key=losses.get)
    assert max(losses) == best + 6
    assert f"early stop      after step {best + 6}" in done.stdout
    run = workplace.folder / "runs/patient"
    assert (run / "checkpoints/best").read_text() == f"step-{best:06d}\n"
    assert f"best            step {best}, held-out loss {losses[best]:.4f}" in done.stdout
    saved = load_file(run / f"checkpoints/step-{best:06d}/state-00001.safetensors")
    for name, tensor in load_file(run / "adapter/adapter_model.safetensors").items():
        (kept,) = [value for key, value in saved.items() if key.startswith("parameter/") and _on_disk(key) == name]
        assert torch.equal(tensor, kept)
    events = EventAccumulator(str(run / "tensorboard")).Reload()
    assert events.Images("router/tasks_x_experts")[-1].step == best + 6


def _on_disk(key: str) -> str:
    """A checkpoint's name of a parameter, as PEFT writes it: without the kind and the adapter's name."""
    return key.partition("/")[2].replace(".default.", ".")


def test_deterministic_reruns_are_bit_equal(workplace):
    for run in ("once", "twice"):
        done = workplace.teamlora("train", "recipe.yaml", f"run.name={run}", "run.deterministic=true", "train.steps=6")
        assert done.returncode == 0, done.stderr
    numbers = [[[r[key] for key in NUMBERS] for r in workplace.records(run)] for run in ("once", "twice")]
    assert numbers[0] == numbers[1]
