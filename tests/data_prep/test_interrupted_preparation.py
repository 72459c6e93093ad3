"""A preparation that is killed or interrupted leaves the old set or none; of two at once one waits."""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from typing import Any

import psutil
import pytest

from data_prep.config import DataConfig
from data_prep.manifest import read_manifest
from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from tests.data_prep.test_prepared_folder import refused

pytestmark = pytest.mark.usefixtures("without_pictures")

fork = multiprocessing.get_context("fork")


def in_a_process(target: Callable[[], None]) -> Any:
    """A process that runs `target` in its own process group, like a shell's command."""

    def run() -> None:
        os.setpgid(0, 0)
        target()

    process = fork.Process(target=run)
    process.start()
    return process


def is_running(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() != psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return False


def wait_until(condition: Callable[[], bool], seconds: float = 10) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def call_before(place: str, action: Callable[[], None], call: int = 1) -> None:
    """Has the `call`-th call of a function, by its dotted name, do `action` first."""
    owner, name = pkgutil.resolve_name(place.rpartition(".")[0]), place.rpartition(".")[2]
    original, calls = getattr(owner, name), []

    def wrapped(*arguments: Any, **keys: Any) -> Any:
        calls.append(1)
        if len(calls) == call:
            action()
        return original(*arguments, **keys)

    setattr(owner, name, wrapped)


def leftovers(config: DataConfig) -> list[str]:
    return [path.name for path in config.prepared_dir.parent.iterdir() if path.name.endswith((".new", ".old"))]


KILLED_AT = {  # what is about to be called, and which call of it
    "encoding": ("data_prep.prepare.Spool.add", 1),
    "splitting": ("data_prep.prepare.split_documents", 1),
    "writing rows": ("data_prep.prepare.write_rows", 2),
    "manifest": ("data_prep.prepare.write_manifest", 1),
    "report": ("data_prep.prepare.write_report", 1),
    "flushing": ("data_prep.publish._flush", 1),
    "first rename": ("data_prep.publish.Path.rename", 1),
    "second rename": ("data_prep.publish.Path.rename", 2),
    "tidying up": ("data_prep.publish.shutil.rmtree", 1),
}


@pytest.mark.parametrize("moment", KILLED_AT)
def test_a_killed_preparation_leaves_the_old_set_or_none_and_no_process(config_of, tokenizer, tmp_path, moment):
    old, new = config_of(), config_of(seq_len=96)
    prepare(old, tokenizer)
    pids = tmp_path / "pids"

    def die() -> None:
        pids.write_text(" ".join(str(child.pid) for child in multiprocessing.active_children()))
        os.kill(os.getpid(), signal.SIGKILL)

    def target() -> None:
        place, call = KILLED_AT[moment]
        if moment == "tidying up":  # the first removal once the new set is in place
            call_before("data_prep.publish.Path.rename", lambda: call_before(place, die), call=2)
        else:
            call_before(place, die, call)
        prepare(new, tokenizer)

    process = in_a_process(target)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    workers = [int(pid) for pid in pids.read_text().split()]
    assert moment != "encoding" or len(workers) == len(os.sched_getaffinity(0))
    try:
        wait_until(lambda: not any(map(is_running, workers)))
    finally:
        for pid in filter(is_running, workers):
            os.kill(pid, signal.SIGKILL)

    assert leftovers(new)
    if moment == "tidying up":
        assert len(open_prepared(new, tokenizer).items) == 4
    else:
        with pytest.raises(UserError, match="run `teamlora prepare"):
            open_prepared(new, tokenizer)
    if moment not in ("second rename", "tidying up"):
        assert len(open_prepared(old, tokenizer).items) == 4
    report = prepare(new, tokenizer)
    assert report.reused == (moment == "tidying up")
    assert not leftovers(new)
    assert open_prepared(new, tokenizer).manifest == read_manifest(new.prepared_dir)
    assert all(len(row["input_ids"]) <= 96 for row in open_prepared(new, tokenizer).train)


def test_a_killed_first_preparation_leaves_no_set(config_of, tokenizer):
    config = config_of()

    def target() -> None:
        call_before("data_prep.publish._flush", lambda: os.kill(os.getpid(), signal.SIGKILL))
        prepare(config, tokenizer)

    process = in_a_process(target)
    process.join(60)
    assert process.exitcode == -signal.SIGKILL
    with pytest.raises(UserError, match=r"^data\.prepared_dir: no prepared set in"):
        open_prepared(config, tokenizer)
    prepare(config, tokenizer)
    assert len(open_prepared(config, tokenizer).items) == 4 and not leftovers(config)


def test_a_second_preparation_waits_says_so_and_keeps_the_firsts_set(config_of, tokenizer):
    config, go_on, inside, said = config_of(), fork.Event(), fork.Event(), []

    def wait() -> None:
        inside.set()
        assert go_on.wait(60)

    def target() -> None:
        call_before("data_prep.prepare.write_manifest", wait)
        prepare(config, tokenizer)

    def say(text: str) -> None:
        said.append(text)
        go_on.set()

    process = in_a_process(target)
    assert inside.wait(60)
    report = prepare(config, tokenizer, say=say)
    process.join(60)
    assert (process.exitcode, report.reused) == (0, True)
    assert said == [f"waiting: another process prepares {config.prepared_dir}"]
    assert not leftovers(config)


def test_a_second_preparation_takes_over_when_the_first_is_killed(config_of, tokenizer):
    config, inside, said = config_of(), fork.Event(), []

    def target() -> None:
        call_before("data_prep.prepare.Spool.add", lambda: (inside.set(), time.sleep(600)))
        prepare(config, tokenizer)

    def say(text: str) -> None:
        said.append(text)
        process.kill()

    process = in_a_process(target)
    assert inside.wait(60)
    report = prepare(config, tokenizer, say=say)
    assert len(said) == 1 and not report.reused and not leftovers(config)
    process.join(60)


MANY = [{"instruction": f"What is {i}? " * 20, "output": str(i)} for i in range(4000)]


@pytest.mark.parametrize("moment", ["reading", "taking in", "writing"])
def test_ctrl_c_ends_it_at_once_without_output_of_the_workers(config_of, tokenizer, tmp_path, moment):
    config = config_of({"sums": MANY}, seq_len=512)
    errors, inside = tmp_path / "errors", fork.Event()
    place = {"reading": "encode_blocks", "taking in": "Spool.add", "writing": "write_rows"}[moment]

    def wait() -> None:
        inside.set()
        if moment != "reading":  # which goes on while we ask
            time.sleep(10)

    def target() -> None:
        sys.stdout = sys.stderr = errors.open("w", buffering=1)
        for stream in (1, 2):
            os.dup2(sys.stderr.fileno(), stream)
        signal.signal(signal.SIGINT, signal.default_int_handler)
        call_before(f"data_prep.prepare.{place}", wait)
        try:
            prepare(config, tokenizer)
        except KeyboardInterrupt:
            os._exit(3 if not multiprocessing.active_children() else 4)

    process = in_a_process(target)
    assert inside.wait(60)
    time.sleep(0.5 if moment == "taking in" else 0.05)  # until the workers wait for more, or while they work
    children = psutil.Process(process.pid).children()
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does: every process of the group
    process.join(60)
    assert process.exitcode == 3  # interrupted, and no worker left
    assert not any(is_running(child.pid) for child in children)
    assert errors.read_text() == ""
    assert not leftovers(config) and not config.prepared_dir.exists()


def _killed(block: Any) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_worker_gives_a_one_line_error(config_of, tokenizer, monkeypatch):
    monkeypatch.setattr("data_prep.workers._encode", _killed)
    refused(r"^data\.sources: a worker process was killed, most likely out of memory; free", config_of(), tokenizer)
