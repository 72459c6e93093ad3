"""What both sides of the step benchmark train on: the setting and the rows."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

TARGETS = ["gate_proj", "up_proj", "down_proj"]
WARM_UP = 2  # steps not counted
ROWS = 64
DEFAULT_BASE = "bases/smollm2-135m-instruct"


@dataclass(frozen=True)
class Setting:
    """What one run of either side is given. persistence_threshold: elements below which ZeRO-3 keeps a tensor whole."""

    total_rank: int = 32
    seq_len: int = 256
    micro_batch_size: int = 2
    steps: int = WARM_UP + 8
    persistence_threshold: int = 0


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
