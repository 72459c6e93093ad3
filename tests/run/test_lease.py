"""Of the launches of one run exactly one trains, whatever becomes of the others, their hosts and the disk."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from data_prep.user_error import UserError
from tests.support.full_disk import files_up_to
from trainer.run.launch_protocol import ENDINGS, FAULT, LAUNCH_ID, Ending, read_endings
from trainer.run.lease import FOLDER, RENEW_EVERY, STALE_AFTER, RunLease
from trainer.run.lease_holder import LeaseHolder

WORKER = Path(__file__).with_name("lease_worker.py")
REPOSITORY = Path(__file__).parent.parent.parent
RENEW, STALE = 0.1, 4.0  # seconds; far apart, since a busy machine may suspend a thread for a second
LONG, SLACK = 60.0, 15.0  # seconds


class Process:
    """Another launch."""

    def __init__(self, **variables: str) -> None:
        self.child = subprocess.Popen(
            [sys.executable, WORKER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**os.environ, "PYTHONPATH": str(REPOSITORY), **variables},
        )  # fmt: skip
        assert self.answer() == "ready"

    def ask(self, *words: object) -> None:
        self.child.stdin.write(" ".join(map(str, words)) + "\n")
        self.child.stdin.flush()

    def answer(self) -> str:
        """The next line, without those that say what it waits for."""
        return next((line.strip() for line in self.child.stdout if not line.startswith("lease ")), "")

    def hold(self, folder: Path, offset: float = 0.0, stale: float = STALE) -> None:
        self.ask("hold", folder, RENEW, stale, offset)

    def signal(self, number: signal.Signals) -> None:
        os.kill(self.child.pid, number)


@pytest.fixture
def start() -> Iterator[type[Process]]:
    started: list[Process] = []

    def start_one(**variables: str) -> Process:
        started.append(Process(**variables))
        return started[-1]

    yield start_one
    for process in started:
        process.child.kill()
        process.child.communicate()


def lease(folder: Path, **options: float) -> RunLease:
    return RunLease(folder, **{"renew_every": RENEW, "stale_after": STALE, **options})


def leave(folder: Path, **changes: object) -> Path:
    """The lease of a process that has ended, as another host would have left it."""
    path = folder / FOLDER / "left"
    path.parent.mkdir(parents=True)
    holder = {**LeaseHolder.of_this_process().model_dump(), "kernel": "another", "host": "node-b", **changes}
    path.write_text(json.dumps(holder))
    return path


@contextlib.contextmanager
def waiting(seconds: float) -> Iterator[None]:
    """Checks how long a block waits; beyond that it may take as long as a loaded machine does."""
    started = time.monotonic()
    yield
    assert seconds <= time.monotonic() - started <= seconds + SLACK


def test_of_launches_at_random_offsets_exactly_one_trains_each_time(tmp_path, start):
    """50 tries: 30 of two, 20 of three. A lease is left behind in every third."""
    rng = random.Random(0)
    everyone = [start() for _ in range(3)]
    for attempt in range(50):
        folder = tmp_path / str(attempt)
        if attempt % 3 == 0:
            leave(folder, kernel=LeaseHolder.of_this_process().kernel, pid=2**22 + 1)  # beyond pid_max
        those = everyone[: 2 if attempt < 30 else 3]
        for process in those:
            process.hold(folder, rng.choice([0, rng.uniform(0, 0.005), rng.uniform(0, 3 * RENEW)]))
        answers = [process.answer() for process in those]
        assert answers.count("holds") == 1, answers
        winner = those[answers.index("holds")]
        assert (folder.with_name(f"{attempt}.journal")).read_text() == "in\n"
        named = f"UserError: {folder}: another launch trains there: process {winner.child.pid} on "
        assert all(answer == "holds" or answer.startswith(named) for answer in answers), answers
        winner.ask("release")
        assert winner.answer() == "released"
        assert list(folder.iterdir()) == []


def test_the_second_launch_is_refused_in_one_line_that_names_the_first(tmp_path, start):
    first = start()
    first.hold(tmp_path)
    assert first.answer() == "holds"
    with pytest.raises(UserError) as refusal, lease(tmp_path).held():
        pass
    (file,) = (tmp_path / FOLDER).iterdir()
    holder = json.loads(file.read_text())
    assert holder["pid"] == first.child.pid
    assert str(refusal.value) == (
        f"{tmp_path}: another launch trains there: process {first.child.pid} on {os.uname().nodename}, since "
        f"{holder['since']}; wait until it ends, stop it (after SIGTERM it saves first), or give another run.name"
    )
    first.ask("release")
    assert first.answer() == "released"
    with lease(tmp_path).held():
        pass
    assert list(tmp_path.iterdir()) == []


def test_the_lease_of_a_lost_host_is_taken_over_within_its_bound_and_the_wait_is_told(tmp_path, capsys):
    leave(tmp_path)
    with waiting(1.0), lease(tmp_path, stale_after=1.0).held():
        assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert "lease           process" in capsys.readouterr().out
    assert (RENEW_EVERY, STALE_AFTER) == (5.0, 30.0)


def test_several_stale_leases_are_waited_for_at_the_same_time(tmp_path, monkeypatch):
    left = leave(tmp_path)
    for number in range(5):
        shutil.copy(left, left.with_name(f"left-{number}"))
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    with RunLease(tmp_path).held():
        assert len(list((tmp_path / FOLDER).iterdir())) == 1
    assert pauses == [0.5] * 60


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '{"pid": "x"}', "\0" * 300, "[" * 100_000])
def test_a_damaged_lease_is_waited_for_like_one_of_another_host(tmp_path, content):
    leave(tmp_path).write_text(content)
    with waiting(0.5), lease(tmp_path, stale_after=0.5).held():
        pass


def test_a_damaged_lease_that_is_renewed_refuses_too(tmp_path):
    path = leave(tmp_path)
    path.write_text("")
    taken = lease(tmp_path)
    stale = taken._others()
    taken._is_stale("left", stale["left"])
    os.utime(path, ns=(0, 0))
    with pytest.raises(UserError, match="another launch trains there: a launch whose lease is damaged; wait until"):
        taken._is_stale("left", taken._others()["left"])


def test_after_a_kill_the_next_launch_on_the_host_does_not_wait(tmp_path, start):
    killed = start()
    killed.hold(tmp_path)
    assert killed.answer() == "holds"
    killed.signal(signal.SIGKILL)
    os.waitid(os.P_PID, killed.child.pid, os.WEXITED | os.WNOWAIT)  # a zombie from here on
    with waiting(0), lease(tmp_path, stale_after=LONG).held():
        pass
    assert list(tmp_path.iterdir()) == []


def test_a_number_that_another_process_has_got_meanwhile_is_not_waited_for(tmp_path):
    here = LeaseHolder.of_this_process()
    leave(tmp_path, kernel=here.kernel, started=str(int(here.started) - 1))
    with waiting(0), lease(tmp_path, stale_after=LONG).held():
        pass


def test_a_retry_of_the_same_launch_does_not_wait_even_on_another_host(tmp_path, monkeypatch):
    leave(tmp_path, launch="one")
    monkeypatch.setenv(LAUNCH_ID, "one.second-start")
    with waiting(0), lease(tmp_path, stale_after=LONG).held():
        pass
    leave(tmp_path, launch="two")
    with waiting(0.5), lease(tmp_path, stale_after=0.5).held():
        pass


def test_a_suspended_holder_that_was_replaced_ends_without_writing_and_says_why(tmp_path, start):
    endings = tmp_path / "endings"
    endings.mkdir()
    suspended = start(**{ENDINGS: str(endings), "RANK": "0"})
    suspended.ask("write_on", tmp_path, RENEW, STALE)
    assert suspended.answer() == "writes"
    suspended.signal(signal.SIGSTOP)
    with waiting(STALE), lease(tmp_path).held():
        before = (tmp_path / "lines").read_text().count("\n")
        suspended.signal(signal.SIGCONT)
        assert suspended.child.wait(SLACK) == FAULT
        assert (tmp_path / "lines").read_text().count("\n") - before <= 1  # one that was under way
        line = suspended.child.stderr.read()
    assert line.startswith(f"error: {tmp_path}: this launch has lost the run to another, which found it suspended")
    assert read_endings(endings)[0] == Ending(FAULT, line.removeprefix("error: ").strip())


def test_a_holder_that_is_suspended_for_less_goes_on(tmp_path, start):
    suspended = start()
    suspended.hold(tmp_path)
    assert suspended.answer() == "holds"
    suspended.signal(signal.SIGSTOP)
    time.sleep(STALE / 2)
    suspended.signal(signal.SIGCONT)
    with pytest.raises(UserError, match="another launch trains there"), lease(tmp_path).held():
        pass
    suspended.ask("release")
    assert suspended.answer() == "released"


def test_a_lease_that_is_renewed_just_before_it_is_taken_over_is_not(tmp_path, monkeypatch):
    """The last look is after the newcomer's own lease is there."""
    path = leave(tmp_path)
    newcomer = lease(tmp_path, stale_after=0.2)
    wait = newcomer._wait_until_stale

    def wait_and_let_it_renew() -> dict:
        stale = wait()
        os.utime(path, ns=(0, 0))
        return stale

    monkeypatch.setattr(newcomer, "_wait_until_stale", wait_and_let_it_renew)
    with pytest.raises(UserError, match="another launch trains there: process"), newcomer.held():
        pass
    assert [each.name for each in path.parent.iterdir()] == ["left"]


def test_a_copied_run_folder_waits_once_and_disturbs_the_original_never(tmp_path, start):
    first = start()
    first.hold(tmp_path / "run")
    assert first.answer() == "holds"
    shutil.copytree(tmp_path / "run", tmp_path / "copy")
    with waiting(0.5), lease(tmp_path / "copy", stale_after=0.5).held():
        pass
    first.ask("release")
    assert first.answer() == "released"


def test_ranks_that_would_not_wait_as_long_are_not_made_to(tmp_path):
    path = leave(tmp_path)
    with (
        pytest.raises(UserError) as refusal,
        RunLease(tmp_path, patience=34).held(),
    ):
        pass
    assert str(refusal.value).startswith(
        f"run.start_timeout=34: expected at least 35 to see whether another launch still trains in {tmp_path}: process "
    )
    assert str(refusal.value).endswith(f"raise it, or remove {path} if that launch has ended")
    path.unlink()
    with RunLease(tmp_path, patience=1).held():
        pass


def test_a_full_disk_leaves_nothing(tmp_path):
    with files_up_to(0), pytest.raises(OSError, match="File too large"), lease(tmp_path / "run").held():
        pass
    assert list((tmp_path / "run").iterdir()) == []


def test_an_interrupt_releases_the_lease_and_later_writes_are_refused(tmp_path):
    taken = lease(tmp_path)
    with pytest.raises(KeyboardInterrupt), taken.held():
        taken.check()
        raise KeyboardInterrupt
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(OSError, match="is released"):
        taken.check()


def test_a_disk_that_is_gone_for_a_while_costs_no_lease(tmp_path):
    taken = lease(tmp_path / "run")
    with taken.held():
        (tmp_path / "run").rename(tmp_path / "aside")
        taken.check()
        (tmp_path / "run").touch()
        taken.check()
        (tmp_path / "run").unlink()
        (tmp_path / "aside").rename(tmp_path / "run")
        time.sleep(3 * RENEW)
        taken.check()


def test_start_up_costs_less_than_the_limit_without_a_lease(tmp_path):
    seconds = []
    for number in range(5):
        started = time.monotonic()
        with RunLease(tmp_path / str(number)).held():
            seconds.append(time.monotonic() - started)
    assert min(seconds) < 0.3
