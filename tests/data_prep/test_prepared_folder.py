"""The prepared folder: kept if it is up to date, and made again if not."""

import multiprocessing
import os
from pathlib import Path
from types import SimpleNamespace

import pytest
from transformers import AutoTokenizer

from data_prep.config import DataConfig
from data_prep.fingerprint import tokenizer_files, tokenizer_hashes
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
