"""Opening a prepared set: only with the configuration it was made for, and only if it is complete."""

import shutil
from pathlib import Path

import pytest

from data_prep.prepare import prepare
from data_prep.reader import open_prepared
from data_prep.user_error import UserError
from tests.data_prep.conftest import SUMS, write_jsonl
from tests.support.tiny_tokenizer import CHATML_TEMPLATE, tiny_tokenizer


def refused(message: str, config, tokenizer) -> None:
    with pytest.raises(UserError, match=message) as caught:
        open_prepared(config, tokenizer)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("missing", ["source", "nothing"])
def test_a_moved_folder_opens_with_and_without_its_sources(config_of, tokenizer, tmp_path, missing):
    config = config_of()
    prepare(config, tokenizer)
    shutil.move(config.prepared_dir, tmp_path / "elsewhere")
    if missing == "source":
        config.sources[0].path.unlink()
    moved = config.model_copy(update={"prepared_dir": tmp_path / "elsewhere"})
    assert len(open_prepared(moved, tokenizer).items) == 4


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"seq_len": 64}, r"^data\.seq_len: the recipe says 64, but .* was prepared with 128; run `teamlora prepare"),
        ({"held_out": 0.5}, r"^data\.held_out: the recipe says 0\.5, but .* with 2"),
        ({"seed": 1}, r"^data\.seed: the recipe says 1, but .* with 0"),
        ({"system_prompt": "Hi"}, r"^data\.system_prompt: the recipe says 'Hi', but .* with None"),
        ({"tasks": {"sums": SUMS}}, r"^data\.sources: the recipe says "),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_a_set_made_with_another_data_section_is_refused(config_of, tokenizer, keys, message):
    prepare(config_of(), tokenizer)
    refused(message, config_of(**keys), tokenizer)


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"special_tokens": ("<|im_start|>", "<|im_end|>")}, "tokenizer"),
        ({"chat_template": CHATML_TEMPLATE + " "}, "chat template"),
    ],
    ids=["vocabulary", "template"],
)
def test_a_set_made_with_another_tokenizer_is_refused(config_of, tokenizer, change, what):
    config = config_of()
    prepare(config, tokenizer)
    other = tiny_tokenizer(**change)
    refused(
        rf"^data\.prepared_dir: .* was prepared with another {what} \(sha256 .*; run `teamlora prepare", config, other
    )


def test_a_changed_source_is_refused(config_of, tokenizer):
    config = config_of()
    prepare(config, tokenizer)
    write_jsonl(config.sources[1].path, SUMS)
    refused(r"^data\.sources\.1\.path: .* has changed since it was prepared", config, tokenizer)


def test_a_folder_without_a_set_is_refused(config_of, tokenizer):
    refused(r"^data\.prepared_dir: no prepared set in .*; run `teamlora", config_of(), tokenizer)


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: (folder / "manifest.json").write_text("{"),
        lambda folder: (folder / "manifest.json").write_text('{"format_version": 0}'),
        lambda folder: (folder / "items.jsonl").unlink(),
        lambda folder: (folder / "items.jsonl").write_text("{"),
        lambda folder: shutil.rmtree(folder / "train"),
        lambda folder: [file.write_bytes(file.read_bytes()[:50]) for file in (folder / "train").glob("*.arrow")],
        lambda folder: shutil.copytree(folder / "held_out", folder / "train", dirs_exist_ok=True),
    ],
    ids=["manifest cut", "other format", "items gone", "items cut", "rows gone", "rows cut", "other rows"],
)
def test_a_damaged_set_is_refused(config_of, tokenizer, damage):
    config = config_of()
    prepare(config, tokenizer)
    damage(config.prepared_dir)
    refused(r"^data\.prepared_dir: .*remove (it|the folder) and run", config, tokenizer)


def test_opening_a_set_reads_no_source(config_of, tokenizer, monkeypatch):
    config = config_of()
    prepare(config, tokenizer)
    opened, open_path = [], Path.open

    def recording(path: Path, *arguments, **keys):
        opened.append(path)
        return open_path(path, *arguments, **keys)

    monkeypatch.setattr(Path, "open", recording)
    open_prepared(config, tokenizer)
    assert opened and config.sources[0].path not in opened
