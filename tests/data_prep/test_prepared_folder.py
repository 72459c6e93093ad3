"""The prepared folder: kept where it is up to date, made anew where it is not, and never left half written."""

import os
from pathlib import Path

import pytest

from data_prep.errors import UserError
from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from tests.data_prep.conftest import SUMS, write_jsonl
from tests.tiny import CHATML_TEMPLATE, tiny_tokenizer


def snapshot(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def refused(message: str, config, tokenizer) -> None:
    """Preparation fails with one line, and nothing in the prepared folder or beside it has changed."""
    before = snapshot(config.prepared_dir.parent)
    with pytest.raises(UserError, match=message) as caught:
        prepare(config, tokenizer)
    assert "\n" not in str(caught.value)
    assert snapshot(config.prepared_dir.parent) == before


def test_preparing_again_gives_the_same_bytes(config_of, tokenizer, tmp_path):
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


def test_changed_source_is_prepared_anew_even_with_its_size_unchanged(config_of, tokenizer):
    config = config_of()
    prepare(config, tokenizer)
    write_jsonl(config.sources[0].path, SUMS[::-1])
    assert not prepare(config, tokenizer).reused


def test_a_damaged_manifest_or_another_tokenizer_has_the_set_made_anew(config_of, tokenizer):
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
        ({"held_out": 8}, r"^data\.held_out: 8 documents per task, but task 'words' has 8 different ones"),
        ({"tasks": {"sums": [*SUMS, {"instruction": "a"}]}}, r"sums\.jsonl:13: lacks field `output`"),
    ],
    ids=["empty task", "all cut", "all held out", "too few", "bad line"],
)
def test_a_failure_leaves_the_folder_as_it_was(config_of, tokenizer, prepared_before, keys, message):
    if prepared_before:
        prepare(config_of(), tokenizer)
    refused(message, config_of(**keys), tokenizer)


def test_a_full_disk_leaves_the_old_set(config_of, tokenizer, monkeypatch):
    def fail(*arguments):
        raise OSError(28, "No space left on device")

    prepare(config_of(), tokenizer)
    monkeypatch.setattr("data_prep.prepare.write_manifest", fail)
    refused(r"^data\.prepared_dir: cannot write .*No space left", config_of(seq_len=64), tokenizer)


def test_a_folder_of_other_files_and_a_file_are_refused(config_of, tokenizer, tmp_path):
    (tmp_path / "thesis").mkdir()
    (tmp_path / "thesis" / "chapter.tex").write_text("mine")
    refused(r"holds files but no prepared set", config_of(prepared_dir=tmp_path / "thesis"), tokenizer)
    chapter = tmp_path / "thesis" / "chapter.tex"
    refused(r"chapter\.tex is a file; give a folder", config_of(prepared_dir=chapter), tokenizer)
