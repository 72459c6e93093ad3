"""All that can be known of a run, and refused, before weights are read."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist

from data_prep.reader import PreparedSet, open_prepared
from data_prep.user_error import UserError
from trainer.adapters.attach import check_adapter
from trainer.base.base_fingerprint import check_base_file
from trainer.base.document_isolation import check_positions
from trainer.base.model_config import load_tokenizer
from trainer.base.weight_map import OpenedBase, describe_unplaced, open_base
from trainer.distributed.deepspeed_config import check_sharded_base, read_deepspeed_config
from trainer.distributed.rank_groups import ShardGroups, shard_groups
from trainer.objective.batches import BatchPlan, plan_batches, steps_in
from trainer.objective.logits_tail import find_logits_tail
from trainer.objective.loss import loss_chunk
from trainer.objective.optimizer import check_optimizer, check_warm_up
from trainer.recipe import Recipe
from trainer.run.gpu import require_gpu


@dataclass(frozen=True)
class RunPlan:
    """config: DeepSpeed's, filled. total_steps: optimizer steps of the whole run."""

    batches: BatchPlan
    config: dict[str, Any]
    groups: ShardGroups
    opened: OpenedBase
    prepared: PreparedSet
    total_steps: int

    def identity(self, recipe: Recipe) -> dict[str, Any]:
        """The facts that every checkpoint of the run repeats, and by which a resumed run is compared with it."""
        return {
            "recipe": recipe.model_dump(mode="json"),
            "world_size": self.batches.world_size,
            "base_fingerprint": self.opened.fingerprint,
            "prepared_key": self.prepared.manifest["key"],
        }


def plan_run(recipe: Recipe, local_ranks: Sequence[int]) -> RunPlan:
    """Opens the base and the prepared set and checks that the recipe goes with them and with these ranks.

    local_ranks: LOCAL_RANK of every rank, in order. Raises UserError.
    """
    train = recipe.train
    batches = plan_batches(train.global_batch_size, train.micro_batch_size, dist.get_world_size())
    config = read_deepspeed_config(recipe, batches)
    check_sharded_base(config, recipe.deepspeed.config)
    groups = shard_groups(recipe, local_ranks, config)
    check_optimizer(train)
    check_offload(recipe)
    opened = open_base(recipe.base)
    check_adapter(opened.model, recipe.adapter)
    if recipe.adapter.init_from is not None:
        check_base_file(recipe.adapter.init_from, recipe.base.model, opened.fingerprint)
    prepared = open_prepared(recipe.data, load_tokenizer(recipe.base, recipe.data.chat_template))
    steps = train.steps or steps_in(train.epochs or 0, len(prepared.train), train.global_batch_size)
    check_warm_up(train, steps)
    check_positions(opened.model.config, recipe.data.seq_len)
    check_held_out(recipe, len(prepared.held_out))
    return RunPlan(batches, config, groups, opened, prepared, steps)


def check_offload(recipe: Recipe) -> None:
    """Raises UserError where activations would have to leave a GPU that is not there."""
    if recipe.train.activation_checkpointing == "offload" and not recipe.run.debug:
        require_gpu("train.activation_checkpointing", "offload", "true, or try it on this CPU with run.debug=true")


def warnings_about(recipe: Recipe, opened: OpenedBase) -> list[str]:
    """Lines about settings that are allowed, and probably not meant."""
    lines = []
    if opened.unplaced:
        lines.append(
            f"warning: base.model holds {describe_unplaced(opened)}; they are neither used nor trained, and merged "
            "exports keep them as they are"
        )
    longest = getattr(opened.model.config, "max_position_embeddings", None)
    if longest is not None and recipe.data.seq_len > longest:
        lines.append(
            f"warning: data.seq_len={recipe.data.seq_len}, but base.model was made for {longest} positions "
            "(max_position_embeddings); later ones may make no sense to it"
        )
    if loss_chunk(recipe, opened.model.config.get_text_config().vocab_size) and find_logits_tail(opened.model) is None:
        lines.append(
            f"warning: train.loss_chunk: {type(opened.model).__name__} computes logits in a way that allows no chunks; "
            "the loss holds those of all labeled tokens of a micro-batch"
        )
    if recipe.base.dtype == "bf16" and not torch.cuda.is_available() and not cpu_has_fast_bf16():
        lines.append(
            "warning: base.dtype=bf16: this CPU has no fast bf16 arithmetic, so steps take many times as long as with "
            "base.dtype=fp32"
        )
    return lines


def cpu_has_fast_bf16() -> bool:
    """False where oneDNN emulates bf16 matrix products: on x86 without AVX-512. Of others nothing is known."""
    return torch.backends.cpu.get_cpu_capability() not in ("DEFAULT", "NO AVX", "AVX2")


def check_held_out(recipe: Recipe, rows: int) -> None:
    """Raises UserError, naming the key, where the recipe needs held-out losses and there are no held-out rows."""
    needing = {
        "train.eval_every": recipe.train.eval_every or None,
        "train.early_stopping_patience": recipe.train.early_stopping_patience,
        "checkpoint.load_best_at_end": recipe.checkpoint.load_best_at_end or None,
    }
    for key, value in needing.items():
        if value is not None and not rows:
            raise UserError(
                f"{key}={value} needs held-out losses, but {recipe.data.prepared_dir} has no held-out rows; prepare "
                "with a larger data.held_out, or remove it"
            )
