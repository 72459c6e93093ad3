"""What both sides of the step benchmark train on, the setting and the rows, and how one of them runs."""

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tests.support.ranks import run_ranks

TARGETS = ["gate_proj", "up_proj", "down_proj"]
WARM_UP = 2  # steps not counted
ROWS = 64
DEFAULT_BASE = "bases/smollm2-135m-instruct"


@dataclass(frozen=True)
class Setting:
    """What one run of either side is given.

    sharded: by ZeRO-3. persistence_threshold: elements below which it keeps a tensor whole.
    """

    total_rank: int = 32
    seq_len: int = 256
    micro_batch_size: int = 2
    steps: int = WARM_UP + 8
    sharded: bool = True
    persistence_threshold: int = 0
    checkpointing: bool = False

    def tokens_per_second(self, found: dict[str, Any]) -> list[float]:
        """Of one rank, in each counted step."""
        return [self.micro_batch_size * self.seq_len / seconds for seconds in found["seconds"][WARM_UP:]]


def run_side(side: str, base: str, rows: Path, setting: Setting, world: int) -> dict[str, Any]:
    """Runs `ours` or `trl` in processes of its own.

    seconds: of each step. losses: of each step. load_seconds: until the first step. Peaks of memory as in
    metrics.jsonl. All of rank 0.
    """
    output = rows.with_suffix(".json")
    run_ranks(world, ["-m", f"benchmarks.step.{side}", base, str(rows), json.dumps(asdict(setting)), str(output)])
    return json.loads(output.read_text())


def write_rows(base: str, labelled: float, seq_len: int, folder: Path) -> None:
    """Rows of `seq_len` real tokens, one document each; the last share of each row is labelled."""
    from datasets import Dataset
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)  # nosec B615 # a local folder
    text = (Path(__file__).parent.parent.parent / "LICENSE").read_text()
    ids = tokenizer(text)["input_ids"]
    stream = np.resize(np.array(ids), ROWS * seq_len).reshape(ROWS, seq_len)
    first = seq_len - round(labelled * seq_len)
    labels = np.where(np.arange(seq_len) >= max(first, 1), stream, -100)
    columns = {
        "input_ids": stream.tolist(),
        "labels": labels.tolist(),
        "position_ids": [list(range(seq_len))] * ROWS,
        "task_ids": [[0] * seq_len] * ROWS,
    }
    Dataset.from_dict(columns).save_to_disk(folder)
