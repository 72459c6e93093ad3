"""Damaged files, and paths that lead to none, end `prepare` with one line, whatever bad_rows is."""

import bz2
import gzip
import lzma
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from data_prep.config import DataConfig
from data_prep.sources.read import read_blocks
from tests.data_prep.reading import refusal
from tests.data_prep.test_damaged_rows import GOOD, LINES, config_of, ends_with, parquet_of, write, zst

# Files that are refused entirely, whatever bad_rows is: name, content, and the message after the path.

TRUNCATED = r"cannot read {}/\S+ \(.+\); it is truncated or damaged, download it again"
NO_PARQUET = r"not a readable Parquet file \(.*Parquet.*\); download it again, or correct its format"
NO_ARROW = r"not a readable Arrow file \(.+\); download it again, or correct its format"
FILES: dict[str, tuple[str, bytes, str]] = {
    "UTF-16": ("a.jsonl", LINES.decode().encode("utf-16"), ":1: the file is UTF-16; save it as UTF-8"),
    "UTF-16 without BOM": ("a.jsonl", LINES.decode().encode("utf-16-le"), ":1: the file holds zero bytes, so it is no"),
    "UTF-16 table": ("a.csv", "text\na\n".encode("utf-16"), ":1: the file is UTF-16; save it as UTF-8"),
    "truncated gzip": ("a.jsonl.gz", gzip.compress(LINES)[:-20], TRUNCATED),
    "truncated bz2": ("a.jsonl.bz2", bz2.compress(LINES)[:-20], TRUNCATED),
    "truncated xz": ("a.jsonl.xz", lzma.compress(LINES)[:-20], TRUNCATED),
    "truncated zst": ("a.jsonl.zst", zst(LINES)[:-20], TRUNCATED),
    "truncated gzip of a table": ("a.csv.gz", gzip.compress(b"text\n" + LINES)[:-20], TRUNCATED),
    "truncated gzip of an array": ("a.json.gz", gzip.compress(b"[" + GOOD + b"]")[:-9], TRUNCATED),
    "no gzip": ("a.jsonl.gz", LINES, r"cannot read {}/a.jsonl.gz \(.*\); it is not compressed, remove .gz"),
    "no zst": ("a.jsonl.zst", LINES, r"cannot read {}/a.jsonl.zst \(.*\); it is not compressed, remove .zst"),
    "changed byte in gzip": ("a.txt.gz", gzip.compress(LINES)[:-8] + bytes(8), TRUNCATED),
    "array cut off": ("a.json", b"[" + GOOD + b', {"instr', r"\[1\]: the array has no end; the file is cut off or a"),
    "array without end": ("a.json", b"[" + GOOD + b",", r"\[1\]: the array has no end; the file is cut off or a quote"),
    "array of numbers": ("a.json", b"[1, 2, 3]", r"\[0\]: found '1, 2, 3\]' in place of an object; expected one array"),
    "no comma": ("a.json", b"[" + GOOD + GOOD + b"]", r"\[1\]: found '{' in place of a comma and an object; expected"),
    "too deep in an array": (
        "a.json",
        b'[{"a": ' + b"[" * 10_000,
        r"\[0\]: over 100 nested lists and objects; simplify",
    ),
    "after an array": ("a.json", b"[" + GOOD + b"]\n" + GOOD, ": found '{' after the end of the array; remove it"),
    "quote without end": (
        "a.csv",
        b'instruction,output\n"a,1\nb,2\n',
        r":2: not a table \(unexpected end of data\); cor",
    ),
    "column twice": ("a.csv", b"text,text\na,b\n", ":1: column 'text' is repeated; rename one"),
    "Latin-1 header": ("a.csv", b"caf\xe9,text\na,b\n", ":1: byte e9 is not UTF-8; save the file as UTF-8"),
    "truncated Parquet": ("a.parquet", parquet_of([{"text": "a"}] * 100)[:-50], ": " + NO_PARQUET),
    "text called Parquet": ("a.parquet", LINES, ": " + NO_PARQUET),
    "empty Parquet": ("a.parquet", b"", r": not a readable Parquet file \(it is empty, 0 bytes\); download it again"),
    "garbage called Arrow": ("a.arrow", bytes(range(256)) * 9, ": " + NO_ARROW),
    "text called Arrow": ("a.arrow", LINES, ": " + NO_ARROW),
    "empty": ("a.jsonl", b"", r"task 'sums' is empty: no record in {}/a.jsonl; add some or remove the source"),
    "blank lines only": ("a.jsonl", b"\n \r\n\t\n", r"task 'sums' is empty: no record in {}/a.jsonl; add some or rem"),
    "empty array": ("a.json", b"[]", r"task 'sums' is empty: no record in {}/a.json; add some or remove the source"),
    "header only": ("a.csv", b"instruction,output\n", r"task 'sums' is empty: no record in {}/a.csv; add some or rem"),
    "unknown ending": ("a.docx", b"PK", r"{}/a.docx does not end in .jsonl, .*; set data.sources.0"),
}


@pytest.mark.parametrize("bad_rows", ["refuse", "drop"])
@pytest.mark.parametrize("kind", FILES)
def test_a_damaged_file_ends_prepare_whatever_bad_rows_is(tmp_path, tokenizer, kind, bad_rows):
    name, content, expected = FILES[kind]
    path = write(tmp_path, name, content)
    message = ends_with(config_of(tmp_path, {"sums": path}, cleaning={"bad_rows": bad_rows}), tokenizer)
    where = rf"(data\.sources(\.0\.path)?: |{re.escape(str(path))})"
    assert re.match(where + expected.replace("{}", re.escape(str(tmp_path)), 1), message), message


def test_a_file_that_breaks_off_after_good_rows_is_refused_too(tmp_path, tokenizer):
    path = write(tmp_path, "a.jsonl.gz", gzip.compress(b"".join(LINES for _ in range(100)))[:-20])
    message = ends_with(config_of(tmp_path, {"sums": path}, cleaning={"bad_rows": "drop"}), tokenizer)
    assert message.endswith("; it is truncated or damaged, download it again")


def test_if_every_row_is_bad_the_first_is_reported(tmp_path, tokenizer):
    path = write(tmp_path, "a.jsonl", b"{\n7\n")
    message = ends_with(config_of(tmp_path, {"sums": path}, cleaning={"bad_rows": "drop"}), tokenizer)
    assert message.startswith("data.sources: task 'sums' has no document left, all 2 were dropped")
    assert f"2 bad_row; the first: {path}:1: not JSON" in message


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.jsonl", "{}/none.jsonl does not exist; expected a file, a pattern or a folder"),
        ("*.jsonl.gz", "no file matches {}/*.jsonl.gz; correct the pattern"),
        ("folder.jsonl", "folder {}/folder.jsonl has no file that ends in .jsonl, "),
        ("loop.jsonl", "{}/loop.jsonl does not exist; expected a file, a pattern or a folder"),
        ("pipe.jsonl", "{}/pipe.jsonl is not a regular file or a link to one; remove or correct it"),
        ("x" * 300 + ".jsonl", "{}/xxx"),
    ],
    ids=["no file", "no match", "folder without files", "link to itself", "pipe", "name too long"],
)
def test_a_path_that_leads_to_no_file_is_refused_with_its_key(tmp_path, tokenizer, path, expected):
    (tmp_path / "folder.jsonl").mkdir()
    (tmp_path / "loop.jsonl").symlink_to("loop.jsonl")
    os.mkfifo(tmp_path / "pipe.jsonl")
    message = ends_with(config_of(tmp_path, {"sums": tmp_path / path}), tokenizer)
    assert message.startswith(f"data.sources.0.path: {expected.format(tmp_path)}")


def test_a_file_that_vanishes_while_others_are_read_is_refused(tmp_path, tokenizer, monkeypatch):
    folder = tmp_path / "data"
    write(folder, "a.jsonl", LINES)
    gone = write(folder, "b.jsonl", LINES)

    def vanishing(config: DataConfig) -> Iterator[Any]:
        for block in read_blocks(config):
            gone.unlink()
            yield block

    monkeypatch.setattr("data_prep.prepare.read_blocks", vanishing)
    assert ends_with(config_of(tmp_path, {"sums": folder}), tokenizer) == (
        f"data.sources.0.path: cannot read {gone} (No such file or directory); give a readable file"
    )


@contextmanager
def as_nobody() -> Iterator[None]:
    """Without root's permission to read everything."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.parametrize("locked", ["folder/a.jsonl", "folder/a.jsonl.gz", "folder/a.parquet", "folder"])
def test_a_file_or_folder_without_read_permission_is_refused(locked):
    with tempfile.TemporaryDirectory() as name:  # pytest's own folders are closed to others
        folder = Path(name)
        write(folder / "folder", "a.jsonl" if locked == "folder" else Path(locked).name, LINES)
        for path in (folder, folder / "folder"):
            path.chmod(0o755)
        (folder / locked).chmod(0)
        try:
            with as_nobody():
                message = refusal(folder / "folder")
        finally:
            (folder / locked).chmod(0o755)
        assert str(folder / locked) in message
        assert "Permission denied" in message
