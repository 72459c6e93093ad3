"""Bytes that are held for part of a run only: within a step, and while loading. Each formula is an upper bound.

Three moments of a step can be the peak. In the head, all activations are held together with a chunk's logits and their
gradients. In a decoder layer's backward, one weight is dequantised, and with checkpointing the layer's recomputed
activations are held again. In both, the parameters that ZeRO-3 gathered are whole (trainer.estimate.gathered). In the
optimizer step none of these are held, but gradients in fp32 and AdamW's temporaries are.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import nn

from trainer.base.nf4 import BLOCK, NF4Linear
from trainer.distributed.autotune import MANY
from trainer.estimate.activations import Activations
from trainer.estimate.gathered import arriving_bytes, gathered_bytes, placed_bytes
from trainer.estimate.rank_model import RankModel
from trainer.estimate.resident import FP32, MemoryUse, partition, sub_groups
from trainer.estimate.zero_settings import ZeroSettings
from trainer.objective.batches import BatchPlan
from trainer.objective.logits_tail import find_logits_tail
from trainer.objective.loss import loss_chunk
from trainer.recipe import ExpertsConfig, Recipe

# Copies of the logits: in fp32 themselves, their log-softmax and its gradient; in the compute dtype the logits and
# their gradient.
FP32_LOGITS, LOGITS = 3, 2
# fp32 values per element that torch's AdamW allocates beside its state: the root of the second moment and its quotient.
ADAMW_TEMPORARIES = 2
# Categories that are allocated only when the first step begins.
NOT_WHILE_LOADING = (
    "gradients",
    "optimizer moments",
    "checkpoint copy",
    "reduce bucket",
    "kept whole (persistence)",
    "offloaded activations",
)
ADAPTER = ("adapter", "master copy")


@dataclass(frozen=True)
class Transient:
    """Device bytes by term; `peak` adds up those that are held at the same time."""

    activations: int
    accumulated: int
    gathered: int
    arriving: int
    placed: int
    logits: int
    recomputed: int
    working: int
    gradient_buckets: int
    step: int

    @property
    def by_name(self) -> dict[str, int]:
        """The terms that are held at the peak."""
        if self.step == self.peak:
            return {"gradients in fp32 and AdamW's work": self.step}
        moment = {"logits and loss": self.logits}
        if self._layer > self.logits:
            moment = {
                "recomputed layer": self.recomputed,
                "working set of a layer": self.working,
                "gradients on their way": self.gradient_buckets,
            }
        return {
            "activations": self.activations,
            "gradients of micro-batches": self.accumulated,
            "gathered parameters": self.gathered,
            "parameters on their way": self.arriving,
            "gathered adapters": self.placed,
            **moment,
        }

    @property
    def _layer(self) -> int:
        return self.recomputed + self.working + self.gradient_buckets

    @property
    def peak(self) -> int:
        throughout = self.activations + self.accumulated + self.gathered + self.arriving + self.placed
        return max(throughout + max(self.logits, self._layer), self.step)


def estimate_transient(
    rank_model: RankModel, activations: Activations, zero: ZeroSettings, recipe: Recipe, plan: BatchPlan
) -> Transient:
    """Estimates a micro-batch whose rows are filled to data.seq_len tokens, all of them labelled."""
    checkpointing = recipe.train.activation_checkpointing
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    sharded = zero.stage == 3 and (plan.world_size > 1 or zero.offload_param)
    return Transient(
        activations=activations.saved(checkpointing),
        accumulated=accumulated_bytes(rank_model, zero, plan.gradient_accumulation_steps),
        gathered=gathered_bytes(rank_model, zero, bool(checkpointing)) if sharded else 0,
        arriving=arriving_bytes(rank_model, zero) if sharded else 0,
        placed=placed_bytes(rank_model),
        logits=logits_bytes(rank_model, recipe, tokens),
        recomputed=activations.layer if checkpointing else 0,
        working=dequantised_bytes(rank_model.model, rank_model.dtype) + backward_bytes(rank_model, tokens),
        gradient_buckets=_buckets(rank_model, zero),
        step=_step(rank_model, zero, recipe.train.optimizer, plan.world_size),
    )


def accumulated_bytes(rank_model: RankModel, zero: ZeroSettings, micro_batches: int) -> int:
    """The gradients of a step's micro-batches, which each rank adds up in fp32.

    In fp32 they are what stages 0 and 1 keep anyway (trainer.estimate.resident).
    """
    if micro_batches == 1 or (zero.stage < 2 and rank_model.dtype.itemsize == FP32):
        return 0
    return FP32 * sum(p.numel() for p in rank_model.trained)


def estimate_loading(resident: Sequence[MemoryUse], rank_model: RankModel, experts: ExpertsConfig) -> MemoryUse:
    """Estimates the peak before the first step, when DeepSpeed takes over the adapted model or dispatch is autotuned.

    Beside the base there is first the whole adapter, as each rank builds it; then its shard, another flattened copy of
    that and its fp32 copy; then the shard, its fp32 copy and the buffers of autotuning.
    """
    base = [use for use in resident if use.name not in (*NOT_WHILE_LOADING, *ADAPTER)]
    shard, master = (next(use for use in resident if use.name == name) for name in ADAPTER)
    whole = sum(p.numel() * p.element_size() for p in rank_model.trained)
    work = max(shard.device, autotune_bytes(rank_model, experts))
    device = max(whole, shard.device + master.device + work)
    host = sum(use.host for use in (*base, shard, master))
    return MemoryUse("while loading", sum(use.device for use in base) + device, host)


def autotune_bytes(rank_model: RankModel, experts: ExpertsConfig) -> int:
    """Dispatch `auto` exchanges outputs of MANY tokens: one rank's, and all ranks' thrice (TokenDispatcher.add)."""
    if rank_model.expert_parallel is None or rank_model.expert_parallel.dispatch != "auto":
        return 0
    widest = max(shard.shape[-1] for layer in rank_model.expert_parallel.layers for shard in layer.experts)
    return (1 + 3 * experts.parallel_size) * MANY * widest * rank_model.dtype.itemsize


def logits_bytes(rank_model: RankModel, recipe: Recipe, tokens: int) -> int:
    """A chunk's logits; with chunks also the gradients of all labelled tokens' hidden states, kept in their place."""
    width, vocabulary = rank_model.dtype.itemsize, rank_model.head.out_features
    chunk = loss_chunk(recipe, vocabulary) if find_logits_tail(rank_model.model) is not None else 0
    kept = tokens * rank_model.head.in_features * width if chunk else 0
    return (chunk or tokens) * vocabulary * (FP32_LOGITS * FP32 + LOGITS * width) + kept


def dequantised_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The largest packed weight, dequantised to the compute dtype, and its block maxima in fp32."""
    sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)]
    return max((numel * dtype.itemsize + -(-numel // BLOCK) * FP32 for numel in sizes), default=0)


def backward_bytes(rank_model: RankModel, tokens: int) -> int:
    """Gradients held at once at a layer's widest linear: of its output and its input, with one copy of each."""
    linears = [m for m in rank_model.decoder_layers[0].modules() if isinstance(m, nn.Linear)]
    return tokens * rank_model.dtype.itemsize * 2 * max(m.in_features + m.out_features for m in linears)


def _buckets(rank_model: RankModel, zero: ZeroSettings) -> int:
    """The reduce buckets of backward under ZeRO-1 and 2, two with overlap; no larger than all gradients."""
    trained = sum(p.numel() for p in rank_model.trained)
    width = rank_model.dtype.itemsize
    if zero.stage in (1, 2):
        return (2 if zero.overlap else 1) * min(zero.reduce_bucket, trained) * width
    return 0


def _step(rank_model: RankModel, zero: ZeroSettings, optimizer: str, world_size: int) -> int:
    """Device bytes for the largest flat tensor that the optimizer steps at once; none with an offloaded optimizer.

    An fp32 copy of its gradient if gradients are summed in bf16, and AdamW's temporaries.
    """
    if zero.offload_optimizer:
        return 0
    trained = rank_model.trained
    if zero.stage == 3:
        stepped = max(sub_groups(trained, rank_model, zero, lambda p: partition(p, rank_model, zero)))
    else:
        stepped = -(-sum(p.numel() for p in trained) // (world_size if zero.stage else 1))
    copies = 0 if rank_model.dtype.itemsize == FP32 else 1
    return FP32 * stepped * (copies + (ADAMW_TEMPORARIES if optimizer == "adamw" else 0))
