"""metrics.jsonl through a disk that fills, and the start of a run's later part."""

import errno
import json
import os
import threading

import pytest
import torch
from tensorboard.compat.tensorflow_stub.io.gfile import LocalFileSystem

from tests.support.full_disk import files_up_to
from trainer.telemetry.metrics import EARLIER, METRICS, MetricsWriter, peak_memory


def steps(path) -> list[int]:
    return [json.loads(line)["step"] for line in path.read_text().splitlines()]


@pytest.mark.parametrize("length", [10, 2500, 50_000])
def test_lines_without_room_wait_for_it(tmp_path, length, capfd):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    with files_up_to(60_000):
        for step in range(1, 41):
            writer.write({"step": step, "text": "x" * length})
        position = writer.position()
    writer.write({"step": 41})
    assert writer.position() > position
    writer.close()
    assert steps(tmp_path / METRICS) == list(range(1, 42))
    assert ("metrics.jsonl cannot be written (File too large); training goes on" in capfd.readouterr().err) == (
        length > 1500
    )


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_disk_that_is_full_for_tensorboard_is_one_warning_and_no_traceback_of_its_thread(
    tmp_path, capfd, monkeypatch
):
    def fail(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    raised = []
    monkeypatch.setattr(threading, "excepthook", raised.append)  # by default it prints a traceback
    writer = MetricsWriter(tmp_path, tensorboard=True)
    writer.write({"step": 1, "loss": 2.0})
    writer.position()
    monkeypatch.setattr(LocalFileSystem, "append", fail)
    for step in (2, 3, 4):
        writer.write({"step": step, "loss": 2.0})
        writer.position()
    other = threading.Thread(target=fail)
    other.start()
    other.join()
    writer.close()
    assert capfd.readouterr().err == (
        "warning: tensorboard cannot be written (No space left on device); training goes on\n"
    )
    assert [each.thread for each in raised] == [other]
    assert steps(tmp_path / METRICS) == [1, 2, 3, 4]


def test_a_later_part_begins_after_whole_lines(tmp_path):
    writer = MetricsWriter(tmp_path, tensorboard=False)
    for step in (1, 2, 3):
        writer.write({"step": step})
    kept = writer.position()
    writer.write({"step": 4})
    writer.close()
    MetricsWriter(tmp_path, tensorboard=False, step=3, own=True).close()
    assert steps(tmp_path / METRICS) == [1, 2, 3]
    with (tmp_path / METRICS).open("rb+") as file:
        file.truncate(kept - 3)  # half of the third is there
    later = MetricsWriter(tmp_path, tensorboard=False, step=2, own=True)
    assert later.position() == 2 * kept // 3
    later.write({"step": 3})
    later.close()
    assert steps(tmp_path / METRICS) == [1, 2, 3]


@pytest.mark.parametrize(
    ("lines", "kept"),
    [
        (['{"step": 1}', '{"step": 3}'], ['{"step": 1}']),
        (['{"step": 1}', '{"step": 2', '{"step": 3}'], ['{"step": 1}']),
        (['{"step": 1', '{"step": 2}', '{"step": 3}'], ['{"step": 1', '{"step": 2}']),
        ([], []),
    ],
    ids=["one is missing", "the last is damaged", "another is damaged", "all are missing"],
)
def test_lines_that_were_changed_since_are_reported_and_training_goes_on(tmp_path, capsys, lines, kept):
    (tmp_path / METRICS).write_text("".join(line + "\n" for line in lines))
    MetricsWriter(tmp_path, tensorboard=False, step=2, own=True).close()
    assert (tmp_path / METRICS).read_text().splitlines() == kept
    told = f"metrics.jsonl was changed since the checkpoint at step 2: {len(kept)} of its lines are kept, and training"
    assert (told in capsys.readouterr().err) == (len(kept) != 2)


@pytest.mark.parametrize("from_step", [0, 2])
@pytest.mark.parametrize("longer", [-30, 0, 30])
def test_no_step_is_lost_where_a_checkpoint_that_was_passed_over_can_be_read_again(tmp_path, capsys, from_step, longer):
    """Trained to step 6, with a checkpoint of step 5; from an earlier one to step 3; then twice from step 5 to 7."""
    first = MetricsWriter(tmp_path, tensorboard=False)
    for step in range(1, 7):
        first.write({"step": step, "seconds": "x" * 40})
    first.close()
    again = MetricsWriter(tmp_path, tensorboard=False, step=from_step, own=from_step > 0, passed_over=True)
    for step in range(from_step + 1, 4):
        again.write({"step": step, "seconds": "x" * (40 + longer)})
    again.close()
    assert steps(tmp_path / METRICS) == [1, 2, 3]
    capsys.readouterr()
    for _ in range(2):
        last = MetricsWriter(tmp_path, tensorboard=False, step=5, own=True)
        for step in (6, 7):
            last.write({"step": step})
        last.close()
        assert steps(tmp_path / METRICS) == [1, 2, 3, 4, 5, 6, 7]
    assert capsys.readouterr().err == ""
    assert {path.name for path in tmp_path.iterdir()} <= {METRICS, EARLIER}


def test_metrics_of_steps_that_are_trained_again_from_the_first_are_kept(tmp_path, capsys):
    for start in (1, 2, 3):
        writer = MetricsWriter(tmp_path, tensorboard=False)
        for step in range(1, start + 1):
            writer.write({"step": step})
        writer.close()
    assert steps(tmp_path / METRICS) == [1, 2, 3]
    assert steps(tmp_path / "metrics-earlier.jsonl") == [1]
    assert steps(tmp_path / "metrics-earlier-2.jsonl") == [1, 2]
    assert "metrics.jsonl of an earlier start (2 steps) is kept as metrics-earlier-2.jsonl" in capsys.readouterr().out


def test_nothing_is_written_without_asking_first(tmp_path):
    """Whoever is asked may end the process; here it raises."""
    allowed = True

    def before_write() -> None:
        if not allowed:
            raise InterruptedError("lost")

    writer = MetricsWriter(tmp_path, tensorboard=False, before_write=before_write)
    writer.write({"step": 1})
    allowed = False
    for write in (lambda: writer.write({"step": 2}), writer.position, writer.close):
        with pytest.raises(InterruptedError):
            write()
    assert steps(tmp_path / METRICS) == [1]
    with pytest.raises(InterruptedError):
        MetricsWriter(tmp_path, tensorboard=False, before_write=before_write)
    assert [path.name for path in tmp_path.iterdir()] == [METRICS]


def test_on_a_gpu_the_memory_that_is_reserved_is_logged_beside_what_is_allocated(monkeypatch):
    """Fragmentation shows in their distance."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: 7)
    monkeypatch.setattr(torch.cuda, "max_memory_reserved", lambda: 9)
    assert peak_memory() == {"peak_memory_bytes": 7, "peak_reserved_bytes": 9}
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert peak_memory().keys() == {"peak_memory_bytes"}
