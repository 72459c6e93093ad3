"""Which files a path stands for, in which order, and which are skipped."""

import os
from pathlib import Path

import pytest

from data_prep.config import FilesSource
from data_prep.sources.finding import find_files, format_of
from data_prep.user_error import UserError


def source_of(path: Path | str, **keys: str) -> FilesSource:
    return FilesSource(type="files", task="sums", path=path, **keys)


def found(path: Path | str, **keys: str) -> tuple[list[str], list[str]]:
    """Names of the files and of those that are skipped."""
    files, skipped = find_files(source_of(path, **keys), "data.sources.0")
    return [file.name for file in files], [file.name for file in skipped]


def refusal(path: Path | str, **keys: str) -> str:
    with pytest.raises(UserError) as caught:
        found(path, **keys)
    message = str(caught.value)
    assert message.splitlines() == [message] and message.startswith("data.sources.0.path: ")
    return message


def fill(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text("{}\n")


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("a.jsonl", "json"),
        ("a.NDJSON", "json"),
        ("a.json.gz", "json"),
        ("a.csv.xz", "csv"),
        ("a.tsv.bz2", "tsv"),
        ("a.parquet", "parquet"),
        ("a.arrow", "arrow"),
        ("a.feather", "arrow"),
        ("a.v2.txt.ZST", "text"),
        ("a.md", "text"),
        ("a.gz", None),
        ("jsonl", None),
        ("a.tar.gz", None),
    ],
)
def test_the_ending_before_the_compression_ending_gives_the_format(name, kind):
    assert format_of(Path(name), source_of("data")) == kind


def test_the_recipes_format_overrides_the_ending():
    assert format_of(Path("a.txt"), source_of("data", format="json")) == "json"


def test_a_folder_is_read_to_its_depth_in_the_order_of_names(tmp_path):
    fill(tmp_path, "b.jsonl", "a.txt", "c/a.csv.gz", "c/d/z.json", "x.jsonl/part.jsonl")
    assert found(tmp_path) == (["a.txt", "b.jsonl", "a.csv.gz", "z.json", "part.jsonl"], [])


def test_unknown_endings_readmes_and_linked_folders_are_listed_as_skipped(tmp_path):
    fill(tmp_path / "data", "a.jsonl", "b.pdf", "c.gz", "LICENSE", "README.md", "sub/readme.txt")
    fill(tmp_path / "other", "x.jsonl")
    (tmp_path / "data/linked").symlink_to(tmp_path / "other")
    skipped = ["LICENSE", "README.md", "b.pdf", "c.gz", "linked", "readme.txt"]
    assert found(tmp_path / "data") == (["a.jsonl"], skipped)


def test_hidden_files_and_folders_are_ignored(tmp_path):
    fill(tmp_path, "a.jsonl", ".b.jsonl", ".git/c.json", ".cache/d.txt")
    assert found(tmp_path) == (["a.jsonl"], [])


def test_what_datasets_keeps_beside_its_files_is_not_data(tmp_path):
    fill(tmp_path, "data-0.arrow", "state.json", "dataset_info.json")
    fill(tmp_path, "cache-10bf2889d93f86cd.arrow")  # of a later .map(): the same rows again
    assert found(tmp_path) == (["data-0.arrow"], ["cache-10bf2889d93f86cd.arrow"])


def test_a_folder_of_several_splits_is_refused(tmp_path):
    fill(tmp_path, "dataset_dict.json", "train/data-0.arrow", "test/data-0.arrow")
    with pytest.raises(UserError, match=r"holds several splits; give one of them, such as .*/train$"):
        found(tmp_path)


def test_a_file_with_an_ignored_name_is_read_if_the_path_names_it(tmp_path):
    fill(tmp_path, "README.md", "state.json")
    assert found(tmp_path / "README.md") == (["README.md"], [])
    assert found(tmp_path / "state.json") == (["state.json"], [])


def test_a_pattern_matches_files_also_through_folders(tmp_path):
    fill(tmp_path, "a.jsonl", "b.jsonl", "c.csv", "d/e.jsonl", "f.jsonl/g.txt", ".h.jsonl")
    assert found(tmp_path / "*.jsonl") == (["a.jsonl", "b.jsonl"], [])
    assert found(tmp_path / "**/*.jsonl") == (["a.jsonl", "b.jsonl", "e.jsonl"], [])
    assert found(tmp_path / "[ac].*") == (["a.jsonl", "c.csv"], [])


def test_a_file_whose_name_looks_like_a_pattern_is_that_file(tmp_path):
    fill(tmp_path, "a[1].jsonl", "a1.jsonl")
    assert found(tmp_path / "a[1].jsonl") == (["a[1].jsonl"], [])


def test_links_to_files_are_read_and_those_that_lead_in_circles_not_followed(tmp_path):
    fill(tmp_path, "a.jsonl", "sub/b.jsonl")
    (tmp_path / "c.jsonl").symlink_to("a.jsonl")
    (tmp_path / "sub/up").symlink_to(tmp_path)
    assert found(tmp_path) == (["a.jsonl", "c.jsonl", "b.jsonl"], ["up"])
    assert found(tmp_path / "**/*.jsonl") == (["a.jsonl", "c.jsonl", "b.jsonl"], [])


def test_a_path_that_is_a_link_to_a_folder_is_that_folder(tmp_path):
    fill(tmp_path / "data", "a.jsonl")
    (tmp_path / "link").symlink_to("data")
    assert found(tmp_path / "link") == (["a.jsonl"], [])


@pytest.mark.parametrize("target", ["nowhere.jsonl", "loop.jsonl"])
def test_a_broken_link_is_refused_not_skipped(tmp_path, target):
    fill(tmp_path, "a.jsonl")
    (tmp_path / "loop.jsonl").symlink_to(target)
    expected = (
        f"data.sources.0.path: {tmp_path}/loop.jsonl is not a regular file or a link to one; remove or correct it"
    )
    assert refusal(tmp_path) == expected
    assert refusal(tmp_path / "*.jsonl") == expected


def test_a_pipe_is_refused_without_waiting_for_data(tmp_path):
    os.mkfifo(tmp_path / "a.jsonl")
    assert "is not a regular file" in refusal(tmp_path / "a.jsonl")
    assert "is not a regular file" in refusal(tmp_path)


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("none.jsonl", "none.jsonl does not exist; expected a file, a pattern or a folder"),
        ("no*.jsonl", "no file matches {}/no*.jsonl; correct the pattern"),
        ("x" * 300, "does not exist; expected a file"),
        ("a.jsonl/b.jsonl", "does not exist; expected a file"),
        ("empty", "folder {}/empty has no file that ends in .jsonl, "),
        ("other", "folder {}/other has no file that ends in .jsonl, "),
        ("other/b.pdf", "b.pdf does not end in .jsonl, "),
        ("other/*", "b.pdf does not end in .jsonl, "),
    ],
)
def test_a_path_without_files_to_read_is_refused_with_its_key(tmp_path, path, expected):
    fill(tmp_path, "a.jsonl", "other/b.pdf")
    (tmp_path / "empty").mkdir()
    assert expected.format(tmp_path) in refusal(tmp_path / path)


def test_any_ending_is_read_if_the_recipe_sets_the_format(tmp_path):
    fill(tmp_path, "b.pdf", "c")
    assert found(tmp_path, format="text") == (["b.pdf", "c"], [])
    assert found(tmp_path / "c", format="text") == (["c"], [])


def test_a_file_name_that_no_report_can_write_is_refused(tmp_path):
    (tmp_path / os.fsdecode(b"caf\xe9.jsonl")).write_text("{}\n")
    assert refusal(tmp_path).endswith(r"caf\udce9.jsonl' is not UTF-8; rename it")


def test_a_folder_that_cannot_be_listed_is_refused_not_skipped(tmp_path, monkeypatch):
    fill(tmp_path, "a.jsonl", "secret/b.jsonl")
    scandir = os.scandir

    def without_permission(path: str):  # as for a user other than root
        if os.path.basename(path) == "secret":
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", without_permission)
    assert refusal(tmp_path) == (
        f"data.sources.0.path: cannot read {tmp_path}/secret (Permission denied); give a readable file"
    )
