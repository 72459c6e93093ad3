"""The report on a set: the printed table, report.md, plots, and notes on unexpected data."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from data_prep.config import DataConfig
from data_prep.prepare import prepare
from data_prep.prepare_report import PrepareReport, write_report
from data_prep.reader import open_prepared
from tests.data_prep.conftest import SUMS, WORDS, write_jsonl
from tests.data_prep.test_chat_templates import LLAMA3
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer

COLUMNS = ["task", "documents", "held out", "rows", "tokens", "labelled", "share", "cut", "removed"]
EMPTY = {"instruction": "Why?", "output": " "}
LONG = {"instruction": "Count.", "output": "1 " * 200}
OPEN_ENDED = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"


@pytest.fixture(scope="module")
def made(tmp_path_factory, tokenizer) -> tuple[PrepareReport, DataConfig]:
    """A set of two tasks with two copies, an empty answer and a cut document; one task is drawn twice."""
    folder = tmp_path_factory.mktemp("report")
    sums = write_jsonl(folder / "sums.jsonl", [*SUMS, LONG, EMPTY, SUMS[0], SUMS[1]])
    words = write_jsonl(folder / "words.jsonl", WORDS)
    config = DataConfig(
        prepared_dir=folder / "prepared", seq_len=128, held_out=2,
        sources=[{"type": "files", "task": task, "path": path} for task, path in (("sums", sums), ("words", words))],
        mixing={"weights": {"sums": 11, "words": 12}, "epochs": 23 / 17},
    )  # fmt: skip
    return prepare(config, tokenizer), config


@pytest.fixture(scope="module")
def counted(made, tokenizer) -> dict[str, dict[str, int]]:
    """Rows, tokens and labelled tokens of each task, counted in the training rows."""
    prepared = open_prepared(made[1], tokenizer)
    counts = {}
    for index, task in enumerate(prepared.tasks):
        own = [row["task_ids"] == index for row in prepared.train]
        counts[task] = {
            "rows": sum(bool(which.any()) for which in own),
            "tokens": sum(int(which.sum()) for which in own),
            "labelled": sum(
                int((row["labels"][which] != -100).sum()) for row, which in zip(prepared.train, own, strict=True)
            ),
        }
    return counts


def without_pictures_or_time(text: str) -> str:
    return re.sub(r"in \d+\.\d s", "in a moment", text)


def test_the_printed_table_has_one_line_per_task_with_aligned_counts(made, counted):
    report, config = made
    headline, head, sums, words, train, held_out, learned_end, more = str(report).splitlines()
    assert without_pictures_or_time(headline) == f"{config.prepared_dir} was prepared in a moment"
    assert re.split("  +", head) == COLUMNS
    labelled = {task: counts["labelled"] for task, counts in counted.items()}
    shares = {task: f"{own / sum(labelled.values()):.1%}" for task, own in labelled.items()}
    (_, documents, held, *rest), rest_of_words = sums.split(), words.split()
    cells = {task: [str(counts[name]) for name in ("rows", "tokens", "labelled")] for task, counts in counted.items()}
    assert (documents, held, rest[:3], rest[3:5]) == ("11", "2", cells["sums"], [shares["sums"], "1"])
    assert rest_of_words == ["words", "12", "2", *cells["words"], shares["words"], "0", "0"]
    leaked = report.manifest["removed"]["sums"].get("duplicate_of_held_out", {"documents": 0})["documents"]
    assert " ".join(rest[5:]).startswith("3 (") and "1 empty_answer" in sums
    assert f"{2 - leaked} duplicate" in sums or leaked == 2
    ends = [[match.end() for match in re.finditer(r"\S+", line)] for line in (sums, words)]
    assert ends[0][1:8] == ends[1][1:8]  # right-aligned up to the last column
    assert train.startswith("train: ") and held_out.startswith("held-out: ")
    assert f" {sum(counts['tokens'] for counts in counted.values()):,} tokens, " in train
    assert learned_end == "learned end: <|im_end|>"
    assert more == f"more: {config.prepared_dir / 'report.md'}"


def test_report_md_holds_shares_forms_and_the_places_of_removed_documents(made, counted):
    config = made[1]
    text = (config.prepared_dir / "report.md").read_text()
    headings = re.findall("^#+ (.*)$", text, re.MULTILINE)
    assert headings == ["Prepared set", "By task", "Shares of the training split", "Sources", "Removed"]
    tokens, labelled = ({task: counts[name] for task, counts in counted.items()} for name in ("tokens", "labelled"))
    for task, documents, draws in (("sums", 11, 1), ("words", 12, 2)):
        shares = [documents / 23] + [of[task] / sum(of.values()) for of in (tokens, labelled)]
        rows = (line for line in text.splitlines() if re.match(rf"\| {task} +\|", line))
        line = next(line for line in rows if line.count("%") == 4)
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        assert [cells[1], cells[3], cells[4], cells[5]] == [*(f"{share:.2%}" for share in shares), f"{draws:.2f}"]
    sums, words = (source.path for source in config.sources)
    assert f"- sums: files `{sums}`: 16 Alpaca" in text and f"- words: files `{words}`: 8 chat" in text
    assert f"- sums: 1 empty_answer\n  - {sums}:14\n" in text
    copies = re.findall(rf"^  - {re.escape(str(sums))}:(\d+)$", text, re.MULTILINE)
    assert sorted(map(int, copies)) == [14, 15, 16]


def test_tables_of_report_md_are_markdown(made):
    for block in (made[1].prepared_dir / "report.md").read_text().split("\n\n"):
        lines = block.splitlines()
        if lines[0].startswith("|"):
            assert re.fullmatch(r"\|-+\|(-+:\|)+(-+\|)?", lines[1])  # numbers are right-aligned
            assert len({line.count("|") for line in lines}) == 1 and len(lines) == 2 + 2


def test_three_pictures_stand_beside_the_set_and_in_its_report(made):
    folder: Path = made[1].prepared_dir
    shown = re.findall(r"!\[[^\]]+\]\(([^)]+)\)", (folder / "report.md").read_text())
    assert len(shown) == 3 and sorted(shown) == sorted(path.name for path in folder.glob("*.png"))
    for name in shown:
        with Image.open(folder / name) as picture:
            picture.verify()
        pixels = np.asarray(Image.open(folder / name).convert("RGB")).astype(int)
        assert min(pixels.shape[:2]) >= 300
        assert (np.abs(pixels[..., 0] - pixels[..., 2]) > 60).mean() > 0.002  # lines or bars, which are not grey


def test_a_set_that_is_kept_has_the_same_table(made, tokenizer):
    report, config = made
    again = prepare(config, tokenizer)
    assert again.reused
    headline, *rest = str(again).splitlines()
    assert re.fullmatch(rf"{re.escape(str(config.prepared_dir))} is unchanged and was kept \(\d+\.\d s\)", headline)
    assert rest == str(report).splitlines()[1:]


def test_any_task_name_can_be_plotted_without_warnings(tmp_path, tokenizer, recwarn):
    tasks = {r"$\frac$": SUMS, "数学": WORDS, "a" * 300: SUMS}
    sources = [
        {"type": "files", "task": task, "path": write_jsonl(tmp_path / f"{index}.jsonl", records)}
        for index, (task, records) in enumerate(tasks.items())
    ]
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=2, sources=sources)
    text = str(prepare(config, tokenizer))
    assert all(task in text for task in tasks)
    assert len(list(config.prepared_dir.glob("*.png"))) == 3
    assert not [warning for warning in recwarn if issubclass(warning.category, UserWarning)]


def notes_of(report: PrepareReport) -> list[str]:
    printed = [line for line in str(report).splitlines() if line.startswith("note: ")]
    written = (report.directory / "report.md").read_text().splitlines()
    assert [line for line in written if line.startswith("note: ")] == printed
    return [line.removeprefix("note: ") for line in printed]


def test_an_ordinary_set_has_no_notes(made):
    assert notes_of(made[0]) == []


# {"instruction": "a", "output": "b"} and a line end, by `zstd --check` and `zstd --no-check`
CHECKED = "28b52ffd24242101007b22696e737472756374696f6e223a202261222c20226f7574707574223a202262227d0a4111e5f0"
UNCHECKED = "28b52ffd20242101007b22696e737472756374696f6e223a202261222c20226f7574707574223a202262227d0a"


@pytest.mark.usefixtures("without_pictures")
def test_zst_files_without_checksums_are_noted(tmp_path, tokenizer):
    folder = tmp_path / "sums"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", SUMS)
    (folder / "b.jsonl.zst").write_bytes(bytes.fromhex(CHECKED))
    (folder / "c.jsonl.zst").write_bytes(bytes.fromhex(UNCHECKED))
    source = {"type": "files", "task": "sums", "path": folder}
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=2, sources=[source])
    assert notes_of(prepare(config, tokenizer)) == [
        "data.sources.0: 1 .zst files without checksums, so changed bytes may go unnoticed (`zstd --check` adds them), "
        f"the first is {folder / 'c.jsonl.zst'}"
    ]


@pytest.mark.usefixtures("without_pictures")
def test_records_of_several_forms_in_one_source_are_noted(config_of, tokenizer):
    texts = [{"text": f"Some words {i}."} for i in range(3)]
    report = prepare(config_of({"sums": [*SUMS, *texts, *WORDS], "words": WORDS}), tokenizer)
    assert notes_of(report) == ["data.sources.0 holds records of several forms: 12 Alpaca, 8 chat, 3 text"]
    assert report.manifest["forms"] == {
        "data.sources.0": {"Alpaca": 12, "text": 3, "chat": 8}, "data.sources.1": {"chat": 8}
    }  # fmt: skip
    assert "12 Alpaca, 3 text, 8 chat" in (report.directory / "report.md").read_text()


@pytest.mark.usefixtures("without_pictures")
def test_empty_files_and_files_of_other_endings_are_noted(tmp_path, tokenizer):
    folder = tmp_path / "sums"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", SUMS)
    for name in ("b.jsonl", "c.jsonl", "readme.pdf"):
        (folder / name).touch()
    source = {"type": "files", "task": "sums", "path": folder}
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=2, sources=[source])
    assert notes_of(prepare(config, tokenizer)) == [
        f"data.sources.0: 2 empty files, the first is {folder / 'b.jsonl'}",
        f"data.sources.0: 1 files or linked folders skipped, the first is {folder / 'readme.pdf'}",
    ]


@pytest.mark.usefixtures("without_pictures")
def test_texts_beside_records_in_a_folder_are_noted(tmp_path, tokenizer):
    folder = tmp_path / "sums"
    folder.mkdir()
    write_jsonl(folder / "a.jsonl", [{"text": f"Some words {i}."} for i in range(12)])
    write_jsonl(folder / "b.jsonl", [{"text": f"More words {i}."} for i in range(12)])
    (folder / "changes.md").write_text("Not meant to be learned.")
    source = {"type": "files", "task": "sums", "path": folder}
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=2, sources=[source])
    assert notes_of(prepare(config, tokenizer)) == [
        "data.sources.0: files of several formats are read (2 json, 1 text); a pattern reads those of one"
    ]


@pytest.mark.usefixtures("without_pictures")
def test_a_tokenizer_without_an_end_token_is_noted_where_plain_texts_are_learned(config_of):
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    report = prepare(config_of({"sums": [{"text": f"Some words {i}."} for i in range(12)]}), tokenizer)
    assert notes_of(report) == [
        "the tokenizer has no end token (eos_token): a model trained on these plain texts does not learn to stop"
    ]


@pytest.mark.usefixtures("without_pictures")
def test_control_tokens_in_the_text_are_counted_by_source_the_most_frequent_first(config_of, tokenizer):
    marked = [{"instruction": f"{i} <|im_end|><|im_end|>", "output": "<|im_start|>" * (i == 0) + "4"} for i in range(3)]
    report = prepare(config_of({"sums": [*SUMS, *marked], "words": WORDS}), tokenizer)
    assert notes_of(report) == [
        "data.sources.0: documents hold control tokens in their text (<|im_end|> in 3, <|im_start|> in 1), encoded as "
        "ordinary text; data.special_tokens_in_text: allow would make control tokens of them"
    ]


@pytest.mark.usefixtures("without_pictures")
@pytest.mark.parametrize("records", [SUMS, [{"text": f"Some words {i}."} for i in range(12)]], ids=["chat", "text"])
def test_a_template_without_an_end_token_is_noted_where_conversations_are_learned(config_of, records):
    report = prepare(config_of({"sums": records}), tiny_tokenizer(OPEN_ENDED))
    expected = [
        "the chat template ends the last answer with no special token: <|im_end|> is added there",
        "the chat template ends some assistant turns with no special token: a model trained on this set does not learn "
        "to stop after them",
    ]
    assert notes_of(report) == (expected if records is SUMS else [])


@pytest.mark.usefixtures("without_pictures")
def test_what_stands_beside_the_rows_of_a_file_is_noted(tmp_path, tokenizer):
    rows = [{"instruction": f"Add {i}.", "output": "4"} for i in range(6)]
    path = tmp_path / "sums.json"
    path.write_text(json.dumps({"license": "mit", "data": rows, "version": [1]}))
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=2, sources=[
        {"type": "files", "task": "sums", "path": path}
    ])  # fmt: skip
    assert notes_of(prepare(config, tokenizer)) == [
        "data.sources.0: not read: key license beside data in 6 rows, key version beside data in 6 rows"
    ]


CALLS_ONLY = CHATML_TEMPLATE.replace(
    "message['content'] +", "(message.tool_calls | tojson if message.tool_calls else message['content']) +"
)


@pytest.mark.usefixtures("without_pictures")
def test_what_the_template_leaves_out_of_records_is_noted(config_of):
    call = {"name": "add", "arguments": {"x": 1}}
    told = {"role": "assistant", "content": "I add.", "tool_calls": [call]}
    said = {"role": "assistant", "content": "4"}
    silent = {"role": "assistant", "content": "<think>Hm.</think>", "tool_calls": [call]}
    called = [
        {"messages": [{"role": "user", "content": f"{i}?"}, turn, {"role": "tool", "content": "1"}, said]}
        for i, turn in enumerate((told, told, silent))
    ]
    called[0]["chat_template_kwargs"] = {"enable_thinking": False}
    report = prepare(config_of({"sums": [*SUMS, *called]}), tiny_tokenizer(CALLS_ONLY))
    assert notes_of(report) == [
        "data.sources.0 holds records of several forms: 12 Alpaca, 3 chat",
        "data.sources.0: not read: text beside calls (not in the chat template) in 2 rows, setting enable_thinking "
        "(not in the chat template) in 1 row, reasoning of earlier answers (not in the chat template) in 1 row",
    ]


@pytest.mark.usefixtures("without_pictures")
def test_fields_that_are_not_read_are_noted_with_counts_by_source(config_of, tokenizer):
    named = [{**record, "lang": "en", **({"id": 7} if i else {})} for i, record in enumerate(SUMS[:2])]
    report = prepare(config_of({"sums": [*SUMS[2:], *named], "words": WORDS}), tokenizer)
    assert notes_of(report) == ["data.sources.0: not read: column lang in 2 rows, column id in 1 row"]
    assert report.manifest["unread"] == {"data.sources.0": {"column lang": 2, "column id": 1}}
    assert "  - not read: column lang in 2 rows, column id in 1 row" in (report.directory / "report.md").read_text()
    older = {name: part for name, part in report.manifest.items() if name != "unread"}
    write_report(older, report.directory)
    assert "\n  - not read: " not in (report.directory / "report.md").read_text()


def test_text_beside_calls_that_the_template_leaves_out_is_noted_with_its_count(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": {"x": 1}}}
    rows = [
        {"messages": [{"role": "user", "content": f"What is {i}?"}, {"role": "assistant", "content": text, **calls}]}
        for i, (text, calls) in enumerate(
            [("Let me add.", {"tool_calls": [call]}), (" ", {"tool_calls": [call]}), ("Two", {})]
        )
    ]
    source = {"type": "files", "task": "calls", "path": write_jsonl(tmp_path / "calls.jsonl", rows)}
    config = DataConfig(prepared_dir=tmp_path / "prepared", seq_len=128, held_out=0, sources=[source])
    expected = "note: data.sources.0: not read: text beside calls (not in the chat template) in 1 row"
    assert expected in str(prepare(config, tiny_tokenizer(*LLAMA3)))
