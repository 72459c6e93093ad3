"""Files that are not what their names say are named for what they are, before anything is read."""

import io
import tarfile
import zipfile

import pytest

from data_prep.config import DataConfig
from data_prep.fingerprint import source_states
from data_prep.user_error import UserError
from tests.data_prep.reading import read, refusal, texts

POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 4711\n"


@pytest.mark.parametrize(
    "name", ["a.jsonl", "a.json", "a.csv", "a.tsv", "a.txt", "a.md", "a.parquet", "a.arrow", "a.jsonl.gz", "a.csv.zst"]
)
@pytest.mark.parametrize("content", [POINTER, POINTER.replace(b"\n", b"\r\n")], ids=["LF", "CRLF"])
def test_a_git_lfs_pointer_of_any_format(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    expected = f"data.sources.0.path: {tmp_path / name} is a Git LFS pointer, not the file; run `git lfs pull`"
    assert refusal(tmp_path / name) == expected
    assert refusal(tmp_path) == expected


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ("/annex/objects/SHA256E-s123--0a.jsonl\n", "a git-annex pointer, not the file; run `git annex get`"),
        ("../.git/annex/objects/9X/0a/MD5E-s1--b/MD5E-s1--b", "a git-annex pointer, not the file; run `git annex get`"),
        ("# xet version 0\nfilesize = 10\n", "a Xet pointer, not the file; download it again with huggingface_hub"),
        ("../../blobs/0a1b2c\n", "a symbolic link saved as text, not the file; copy the file that it names"),
    ],
)
@pytest.mark.parametrize("name", ["a.jsonl", "a.txt", "a.tsv", "a.parquet"])
def test_other_pointers_in_place_of_a_file(tmp_path, name, content, expected):
    (tmp_path / name).write_text(content)
    assert refusal(tmp_path / name) == f"data.sources.0.path: {tmp_path / name} is {expected}"


def test_a_text_that_begins_like_a_link_is_text(tmp_path):
    (tmp_path / "a.txt").write_text("../docs is the folder that holds them.")
    assert len(read(tmp_path / "a.txt")) == 1


def test_a_text_about_pointers_is_text(tmp_path):
    text = "The file begins with version https://git-lfs.github.com/spec/v1"
    (tmp_path / "a.txt").write_text(text)
    assert texts(read(tmp_path / "a.txt")) == [text]


@pytest.mark.parametrize("page", ["<!DOCTYPE html><html>", "\n <html lang=en>", '<?xml version="1.0"?><Error>'])
def test_a_web_page_saved_as_data(tmp_path, page):
    for name in ("a.jsonl", "a.csv", "a.parquet"):
        (tmp_path / name).write_text(page)
        assert refusal(tmp_path / name).endswith(
            f"{name} is a web page or an error in place of the file; download it again, with a login if it needs one"
        )
    (tmp_path / "a.txt").write_text(page)
    assert len(read(tmp_path / "a.txt")) == 1  # people train on pages, too


def archive(kind: str) -> bytes:
    content = io.BytesIO()
    if kind == "zip":
        with zipfile.ZipFile(content, "w") as file:
            file.writestr("a.jsonl", "{}")
    else:
        with tarfile.open(fileobj=content, mode=kind) as file:
            file.addfile(tarfile.TarInfo("a.jsonl"), io.BytesIO())
    return content.getvalue()


@pytest.mark.parametrize("name", ["a.zip", "a.tar", "a.tar.gz", "a.tgz", "a.jsonl.zip", "a.7z"])
def test_an_archive_by_its_name(tmp_path, name):
    (tmp_path / name).write_bytes(b"")
    expected = f"data.sources.0.path: {tmp_path / name} is an archive; unpack it, and give the folder"
    assert refusal(tmp_path / name) == expected
    assert refusal(tmp_path / name, format="json") == expected


@pytest.mark.parametrize(
    ("name", "kind", "what"),
    [
        ("a.jsonl", "zip", "a ZIP archive"),
        ("a.csv", "zip", "a ZIP archive, as Excel's files are too"),
        ("a.txt", "w", "a tar archive"),
        ("a.jsonl.gz", "w:gz", "a tar archive"),
    ],
)
def test_an_archive_by_its_content(tmp_path, name, kind, what):
    (tmp_path / name).write_bytes(archive(kind))
    assert f"{tmp_path / name} is {what}" in refusal(tmp_path / name)


def test_a_folder_of_several_versions_in_the_hubs_cache(tmp_path):
    for name in ("blobs", "snapshots/a", "snapshots/b"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "x.jsonl").write_text('{"text": "a"}\n')
    assert refusal(tmp_path) == (
        f"data.sources.0.path: {tmp_path} holds 2 versions in the Hub's cache; give one, such as {tmp_path}/snapshots/a"
    )
    assert texts(read(tmp_path / "snapshots/a")) == ["a"]


def test_a_preparation_looks_at_every_file_before_it_reads_one_to_its_end(tmp_path, monkeypatch):
    (tmp_path / "a.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "b.jsonl").write_bytes(POINTER)
    source = {"type": "files", "task": "task", "path": tmp_path}
    config = DataConfig(prepared_dir=tmp_path.parent / "prepared", sources=[source], seq_len=64)
    monkeypatch.setattr("hashlib.file_digest", lambda *arguments: pytest.fail("a file was read"))
    with pytest.raises(UserError, match=r"b\.jsonl is a Git LFS pointer, not the file; run `git lfs pull`$"):
        source_states(config)
