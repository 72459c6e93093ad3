import json
from collections.abc import Callable
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from data_prep.config import DataConfig
from tests.support.tiny_tokenizer import tiny_tokenizer

SUMS = [{"instruction": f"What is {i} + {i}?", "output": str(2 * i)} for i in range(12)]
WORDS = [
    {
        "messages": [
            {"role": "system", "content": "Sort."},
            {"role": "user", "content": f"b{i} a"},
            {"role": "assistant", "content": f"a b{i}"},
            {"role": "user", "content": "Last?"},
            {"role": "assistant", "content": f"b{i}"},
        ]
    }
    for i in range(8)
]


def write_jsonl(path: Path, records: list[dict]) -> Path:
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records))
    return path


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return tiny_tokenizer()


@pytest.fixture
def without_pictures(monkeypatch) -> None:
    """For tests that prepare a set and look at something else: drawing takes most of a small preparation's time."""
    monkeypatch.setattr("data_prep.prepare.write_plots", lambda manifest, directory: None)


@pytest.fixture
def config_of(tmp_path) -> Callable[..., DataConfig]:
    """Makes the data section for one JSONL file per task, by default `sums` in Alpaca and `words` in chat form."""

    def make(tasks: dict[str, list[dict]] | None = None, **keys: object) -> DataConfig:
        tasks = {"sums": SUMS, "words": WORDS} if tasks is None else tasks
        files = {task: write_jsonl(tmp_path / f"{task}.jsonl", records) for task, records in tasks.items()}
        sources = [{"type": "files", "task": task, "path": path} for task, path in files.items()]
        defaults = {"prepared_dir": tmp_path / "prepared", "seq_len": 128, "held_out": 2}
        return DataConfig(sources=sources, **{**defaults, **keys})

    return make
