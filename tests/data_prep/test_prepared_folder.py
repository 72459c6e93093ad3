"""The prepared folder: kept if it is up to date, made again if not, and never half written."""

import multiprocessing
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import psutil
import pytest
from transformers import AutoTokenizer

from data_prep.config import DataConfig
from data_prep.fingerprint import tokenizer_files, tokenizer_hashes
from data_prep.manifest import read_manifest
from data_prep.plots import write_plots
from data_prep.prepare import find_unchanged_set, prepare
from data_prep.prepare_report import PrepareReport
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from tests.data_prep.conftest import SUMS, write_jsonl
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer
from trainer.base.model_config import load_tokenizer

pytestmark = pytest.mark.usefixtures("without_pictures")


def snapshot(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file() and path.suffix != ".lock")
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def refused(message: str, config, tokenizer) -> None:
    """Preparation fails with one line, no worker is left, and nothing in the folder or beside it has changed."""
    before = snapshot(config.prepared_dir.parent)
    with pytest.raises(UserError, match=message) as caught:
        prepare(config, tokenizer)
    assert "\n" not in str(caught.value)
    assert not multiprocessing.active_children()
    assert snapshot(config.prepared_dir.parent) == before


def test_preparing_again_gives_the_same_bytes(config_of, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr("data_prep.prepare.write_plots", write_plots)
    config = config_of()
    prepare(config, tokenizer)
    first = snapshot(config.prepared_dir)
    config.prepared_dir.rename(tmp_path / "old")
    assert not prepare(config, tokenizer).reused
    assert snapshot(config.prepared_dir) == first


@pytest.mark.parametrize("change", ["nothing", "time of a source", "pad token", "padding and truncation"])
def test_what_cannot_change_the_rows_keeps_the_folder(config_of, change):
    config, tokenizer = config_of(), tiny_tokenizer()
    prepare(config, tokenizer)
    before = {path: path.stat().st_mtime_ns for path in config.prepared_dir.rglob("*")}
    if change == "time of a source":
        os.utime(config.sources[0].path, (1, 1))
    elif change == "pad token":
        tokenizer.pad_token = "<|endoftext|>"
    elif change == "padding and truncation":
        tokenizer(["a", "b c"], padding=True, truncation=True, max_length=2)
    assert prepare(config, tokenizer).reused
    assert {path: path.stat().st_mtime_ns for path in config.prepared_dir.rglob("*")} == before
    open_prepared(config, tokenizer)


def test_a_changed_source_is_prepared_again_even_if_its_size_is_unchanged(config_of, tokenizer):
    config = config_of()
    prepare(config, tokenizer)
    write_jsonl(config.sources[0].path, SUMS[::-1])
    assert not prepare(config, tokenizer).reused


def test_a_damaged_manifest_or_another_tokenizer_makes_the_set_again(config_of, tokenizer):
    config = config_of()
    prepare(config, tokenizer)
    (config.prepared_dir / "manifest.json").write_text("{")
    assert not prepare(config, tokenizer).reused
    assert not prepare(config, tiny_tokenizer(CHATML_TEMPLATE + " ")).reused


@pytest.mark.parametrize("prepared_before", [False, True], ids=["first time", "over a set"])
@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"tasks": {"sums": SUMS, "words": []}}, r"^data\.sources: task 'words' is empty: no record in .*words\.jsonl"),
        ({"seq_len": 8}, r"task 'sums' has no document left, all 12 were dropped at data\.seq_len=8 \(12 no_labels"),
        ({"held_out": 1 - 1e-12}, r"^data\.held_out: .* leaves no document of task 'sums' to train on"),
        ({"held_out": 8}, r"^data\.held_out: 8 documents per task, but task 'words' has 8 distinct ones"),
        ({"tasks": {"sums": [*SUMS, {"instruction": "a"}]}}, r"sums\.jsonl:13: lacks field `output`"),
    ],
    ids=["empty task", "all cut", "all held out", "too few", "bad line"],
)
def test_a_failure_leaves_the_folder_as_it_was(config_of, tokenizer, prepared_before, keys, message):
    if prepared_before:
        prepare(config_of(), tokenizer)
    refused(message, config_of(**keys), tokenizer)


@pytest.mark.parametrize("place", ["Spool.add", "write_rows", "write_manifest"])
def test_a_full_disk_leaves_the_old_set(config_of, tokenizer, monkeypatch, place):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    prepare(config_of(), tokenizer)
    monkeypatch.setattr(f"data_prep.prepare.{place}", fail)
    refused(r"^data\.prepared_dir: cannot write .*No space left", config_of(seq_len=64), tokenizer)


def test_a_folder_of_other_files_and_a_file_are_refused(config_of, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    refused(r"holds files but no prepared set", config_of(prepared_dir=tmp_path / "thesis"), tokenizer)
    chapter = tmp_path / "thesis" / "chapter.tex"
    refused(r"chapter\.tex is a file; give a folder", config_of(prepared_dir=chapter), tokenizer)


# Kept without a tokenizer


@pytest.fixture
def base(tmp_path) -> Path:
    """The folder of a model, as far as its tokenizer goes."""
    folder = tmp_path / "base"
    tiny_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"model_type": "llama"}')
    return folder


@pytest.fixture
def folder_config(tmp_path) -> DataConfig:
    """The data section for a folder of two files, with the recipe's own chat template."""
    (tmp_path / "sums").mkdir()
    write_jsonl(tmp_path / "sums" / "a.jsonl", SUMS[:6])
    write_jsonl(tmp_path / "sums" / "b.jsonl", SUMS[6:])
    (tmp_path / "own.jinja").write_text(CHATML_TEMPLATE.replace("SmolLM", "Own"))
    return DataConfig(
        prepared_dir=tmp_path / "prepared",
        sources=[{"type": "files", "task": "sums", "path": tmp_path / "sums"}],
        seq_len=128, held_out=2, chat_template=tmp_path / "own.jinja",
    )  # fmt: skip


def prepare_as_the_command(config: DataConfig, base: Path) -> tuple[PrepareReport, bool]:
    """What `teamlora prepare` does, and whether it needed a tokenizer."""
    files = tokenizer_files(base, config)
    report = find_unchanged_set(config, files)
    if report is not None:
        return report, False
    model = SimpleNamespace(model=str(base), trust_remote_code=False)
    return prepare(config, load_tokenizer(model, config.chat_template), files), True


def edit(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def test_an_unchanged_set_is_kept_without_reading_a_tokenizer(folder_config, base):
    report, loaded = prepare_as_the_command(folder_config, base)
    assert loaded and not report.reused
    before = snapshot(folder_config.prepared_dir)
    report, loaded = prepare_as_the_command(folder_config, base)
    assert report.reused and not loaded
    assert snapshot(folder_config.prepared_dir) == before
    assert "is unchanged and was kept" in str(report)


@pytest.mark.parametrize(
    "change",
    [
        lambda tmp: edit(tmp / "base" / "tokenizer.json", '"<|im_start|>"', '"<|im_begin|>"'),
        lambda tmp: edit(tmp / "base" / "tokenizer_config.json", "<|im_end|>", "<|endoftext|>"),
        lambda tmp: edit(tmp / "own.jinja", "Own", "Mine"),
        lambda tmp: edit(tmp / "sums" / "b.jsonl", "What is 7", "What's 7"),
        lambda tmp: write_jsonl(tmp / "sums" / "c.jsonl", SUMS[:1]),
        lambda tmp: (tmp / "sums" / "b.jsonl").unlink(),
        lambda tmp: (tmp / "sums" / "b.jsonl").rename(tmp / "sums" / "0.jsonl"),
        lambda tmp: (tmp / "base" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}'),
    ],
    ids=[
        "vocabulary",
        "end token",
        "template",
        "source",
        "source added",
        "source removed",
        "source renamed",
        "where generation stops",
    ],
)
def test_what_can_change_the_rows_makes_them_again(folder_config, base, tmp_path, change):
    prepare_as_the_command(folder_config, base)
    change(tmp_path)
    assert find_unchanged_set(folder_config, tokenizer_files(base, folder_config)) is None
    if "im_begin" in (base / "tokenizer.json").read_text():
        return  # no longer a tokenizer for this template
    report, loaded = prepare_as_the_command(folder_config, base)
    assert loaded and not report.reused


@pytest.mark.parametrize(
    ("change", "needs_tokenizer"),
    [
        (lambda tmp: os.utime(tmp / "base" / "tokenizer.json", (1, 1)), False),
        (lambda tmp: os.utime(tmp / "sums" / "a.jsonl", (1, 1)), False),
        (lambda tmp: (tmp / "base" / "model.safetensors").write_bytes(b"weights"), False),
        (lambda tmp: (tmp / "base" / "chat_template.jinja").write_text("{{ 1 }}"), True),
        (lambda tmp: (tmp / "sums" / ".hidden.jsonl").write_text("{"), False),
        (lambda tmp: (tmp / "base" / "generation_config.json").write_text('{"temperature": 0.6}'), True),
    ],
    ids=[
        "time of a tokenizer file",
        "time of a source",
        "weights",
        "the tokenizer's own template",
        "hidden file",
        "how generation samples",
    ],
)
def test_what_cannot_change_the_rows_keeps_them(folder_config, base, tmp_path, change, needs_tokenizer):
    prepare_as_the_command(folder_config, base)
    change(tmp_path)
    report, loaded = prepare_as_the_command(folder_config, base)
    assert report.reused and loaded is needs_tokenizer


def config_of_folder(folder: Path, prepared_dir: Path) -> DataConfig:
    source = {"type": "files", "task": "sums", "path": folder, "sample_by": "line"}
    return DataConfig(prepared_dir=prepared_dir, sources=[source], seq_len=128, held_out=2)


def test_a_file_with_a_new_ending_is_read_again(tokenizer, tmp_path):
    (tmp_path / "docs").mkdir()
    path = write_jsonl(tmp_path / "docs" / "a.txt", SUMS)
    config = config_of_folder(tmp_path / "docs", tmp_path / "prepared")
    assert prepare(config, tokenizer).manifest["forms"]["data.sources.0"] == {"text": 12}
    path.rename(path.with_suffix(".jsonl"))
    assert prepare(config, tokenizer).manifest["forms"]["data.sources.0"] == {"Alpaca": 12}


def test_a_source_that_includes_the_prepared_set_is_refused(tokenizer, tmp_path):
    write_jsonl(tmp_path / "a.jsonl", SUMS)
    with pytest.raises(UserError, match=r"^data\.sources\.0\.path: .* includes data\.prepared_dir=.*; give data"):
        prepare(config_of_folder(tmp_path, tmp_path / "prepared"), tokenizer)


def test_another_template_for_tools_makes_another_set():
    one, other = tiny_tokenizer(), tiny_tokenizer()
    one.chat_template = {"default": CHATML_TEMPLATE, "tool_use": CHATML_TEMPLATE}
    other.chat_template = {"default": CHATML_TEMPLATE, "tool_use": CHATML_TEMPLATE + " "}
    assert tokenizer_hashes(one) != tokenizer_hashes(other)


def test_a_set_is_not_kept_for_another_configuration_or_where_there_is_none(folder_config, base):
    files = tokenizer_files(base, folder_config)
    assert find_unchanged_set(folder_config, files) is None
    prepare_as_the_command(folder_config, base)
    assert find_unchanged_set(folder_config.model_copy(update={"seq_len": 96}), files) is None
    assert find_unchanged_set(folder_config.model_copy(update={"chat_template": None}), files) is None
    (folder_config.prepared_dir / "manifest.json").write_text("{")
    assert find_unchanged_set(folder_config, files) is None


def test_the_recipes_chat_template_is_that_of_the_rows_and_of_the_tokenizer(folder_config, base):
    prepare_as_the_command(folder_config, base)
    model = SimpleNamespace(model=str(base), trust_remote_code=False)
    tokenizer = load_tokenizer(model, folder_config.chat_template)
    assert AutoTokenizer.from_pretrained(base).chat_template == CHATML_TEMPLATE
    assert tokenizer.chat_template == folder_config.chat_template.read_text() != CHATML_TEMPLATE
    row = open_prepared(folder_config, tokenizer).train[0]
    assert tokenizer.decode(row["input_ids"]).startswith("<|im_start|>system\nYou are a helpful AI assistant named Own")
    with pytest.raises(UserError, match=r"was prepared with another chat template"):
        open_prepared(folder_config, load_tokenizer(model))


@pytest.mark.parametrize("prepared_before", [False, True], ids=["first time", "over a set"])
def test_an_unreadable_chat_template_is_refused_with_its_key(folder_config, base, prepared_before):
    if prepared_before:
        prepare_as_the_command(folder_config, base)
    folder_config.chat_template.unlink()
    with pytest.raises(UserError, match=r"^data\.chat_template: cannot read .*own\.jinja .*; expected a") as caught:
        prepare_as_the_command(folder_config, base)
    assert "\n" not in str(caught.value)


# Killed, interrupted, and two at once

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
