"""One timed run of TRL's SFTTrainer with PEFT's LoRA, one rank of it: the other side of `python -m benchmarks.step`."""

import json
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from datasets import load_from_disk
from peft import LoraConfig
from transformers import AutoTokenizer, TrainerCallback
from trl import SFTConfig, SFTTrainer

from benchmarks.shared.usual_quantization import usual_quantization
from benchmarks.step.setting import TARGETS, Setting
from trainer.telemetry.metrics import peak_memory


def collate(rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
    """Rows of one length -> int64 [batch, seq] each; no attention_mask, as on our side."""
    return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels", "position_ids")}


class StepClock(TrainerCallback):
    """Wall seconds of each optimizer step, and the losses logged."""

    def __init__(self) -> None:
        self.marks: list[float] = []
        self.losses: list[float] = []

    def on_train_begin(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_: Any, **__: Any) -> None:
        self.marks.append(time.perf_counter())

    def on_log(self, _args: Any, _state: Any, _control: Any, logs: dict[str, float], **__: Any) -> None:
        if "loss" in logs:
            self.losses.append(logs["loss"])

    def seconds(self) -> list[float]:
        return [after - before for before, after in zip(self.marks, self.marks[1:], strict=False)]


def zero3(setting: Setting) -> dict[str, Any]:
    """DeepSpeed's configuration."""
    return {
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": 3,
            "stage3_param_persistence_threshold": setting.persistence_threshold,
            "reduce_bucket_size": 5e7,
            "stage3_prefetch_bucket_size": 5e7,
        },
    }


def main(base: str, rows: str, setting: Setting, output: Path) -> None:
    config = SFTConfig(
        output_dir=str(output.with_suffix("")),
        use_cpu=not torch.cuda.is_available(),
        ddp_backend="nccl" if torch.cuda.is_available() else "gloo",
        bf16=True,
        deepspeed=zero3(setting) if setting.sharded else None,
        per_device_train_batch_size=setting.micro_batch_size,
        max_steps=setting.steps,
        learning_rate=2e-4,
        lr_scheduler_type="constant",
        optim="adamw_torch",
        gradient_checkpointing=setting.checkpointing,
        gradient_checkpointing_kwargs={"use_reentrant": False},
        train_sampling_strategy="sequential",
        remove_unused_columns=False,
        dataset_kwargs={"skip_prepare_dataset": True},
        max_length=None,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        model_init_kwargs={"dtype": "bfloat16"},
    )
    clock, started = StepClock(), time.perf_counter()
    tokenizer = AutoTokenizer.from_pretrained(base)  # nosec B615 # a local folder
    trainer = SFTTrainer(
        model=base,
        args=config,
        train_dataset=load_from_disk(rows),
        data_collator=collate,
        processing_class=tokenizer,
        callbacks=[clock],
        quantization_config=usual_quantization(),
        peft_config=LoraConfig(
            r=setting.total_rank,
            lora_alpha=setting.total_rank,
            lora_dropout=0.0,
            target_modules=TARGETS,
            task_type="CAUSAL_LM",
        ),
    )
    load_seconds = time.perf_counter() - started
    trainer.train()
    if config.process_index == 0:
        found = {"seconds": clock.seconds(), "losses": clock.losses}
        output.write_text(json.dumps({**found, "load_seconds": load_seconds, **peak_memory()}))
    dist.barrier()
    dist.destroy_process_group()  # with its threads alive a process may abort at its end


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], Setting(**json.loads(sys.argv[3])), Path(sys.argv[4]))
