"""Bytes that come and go within a step: formulas, each an upper bound of one thing.

Three moments can be the highest. In the head, all activations are kept while logits and their gradients stand. In a
decoder layer's backward one weight is dequantised, and with checkpointing the layer keeps again what it would have
kept. In both, parameters are whole that ZeRO-3 gathered (trainer.estimate.gathered). In the optimizer step there are
none of these, but gradients in fp32 and AdamW's temporaries.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trainer.base.nf4 import BLOCK, NF4Linear
from trainer.estimate.activations import Activations
from trainer.estimate.gathered import arriving_bytes, decoder_layers, gathered_bytes, placed_bytes
from trainer.estimate.rank_model import RankModel
from trainer.estimate.resident import FP32, partition, sub_groups
from trainer.estimate.zero_settings import ZeroSettings
from trainer.recipe import Recipe

# fp32 values a logit: themselves, their log-softmax and its gradient; beside them two in the compute dtype (logits
# and their gradient).
FP32_LOGITS, LOGITS = 3, 2
# fp32 values an element that torch's AdamW makes beside its state: the root of the second moment, and that divided.
ADAMW_TEMPORARIES = 2


@dataclass(frozen=True)
class Transient:
    """Device bytes by term; `peak` adds up those that stand at the same time."""

    activations: int
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
        """The terms that stand in the highest moment."""
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
            "gathered parameters": self.gathered,
            "parameters on their way": self.arriving,
            "gathered experts": self.placed,
            **moment,
        }

    @property
    def _layer(self) -> int:
        return self.recomputed + self.working + self.gradient_buckets

    @property
    def peak(self) -> int:
        standing = self.activations + self.gathered + self.arriving + self.placed
        return max(standing + max(self.logits, self._layer), self.step)


def transient(
    rank_model: RankModel, kept: Activations, zero: ZeroSettings, recipe: Recipe, world_size: int
) -> Transient:
    """Of a rank's micro-batch of rows filled to data.seq_len, every token labelled."""
    model, width = rank_model.model, rank_model.dtype.itemsize
    checkpointing = recipe.train.activation_checkpointing
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    head = model.get_base_model().get_output_embeddings()
    sharded = zero.stage == 3 and (world_size > 1 or zero.offload_param)
    return Transient(
        activations=kept.saved(checkpointing),
        gathered=gathered_bytes(rank_model, zero, checkpointing) if sharded else 0,
        arriving=arriving_bytes(rank_model, zero) if sharded else 0,
        placed=placed_bytes(rank_model),
        logits=tokens * head.out_features * (FP32_LOGITS * FP32 + LOGITS * width),
        recomputed=kept.layer if checkpointing else 0,
        working=dequantised_bytes(model, rank_model.dtype) + backward_bytes(model, tokens, width),
        gradient_buckets=_buckets(rank_model, zero),
        step=_step(rank_model, zero, recipe.train.optimizer, world_size),
    )


def dequantised_bytes(model: nn.Module, dtype: torch.dtype) -> int:
    """The largest packed weight in the compute dtype, in which it is used, and its maxima in fp32."""
    sizes = [m.in_features * m.out_features for m in model.modules() if isinstance(m, NF4Linear)]
    return max((numel * dtype.itemsize + -(-numel // BLOCK) * FP32 for numel in sizes), default=0)


def backward_bytes(model: nn.Module, tokens: int, width: int) -> int:
    """Gradients that stand at once at the widest linear of a layer: of its output and its input, each with a copy."""
    linears = [m for m in decoder_layers(model)[0].modules() if isinstance(m, nn.Linear)]
    return tokens * width * 2 * max(m.in_features + m.out_features for m in linears)


def _buckets(rank_model: RankModel, zero: ZeroSettings) -> int:
    """Under ZeRO-1 and 2 the reduce buckets of backward, two with overlap; never more than there are gradients."""
    trained = sum(p.numel() for p in rank_model.model.parameters() if p.requires_grad)
    width = rank_model.dtype.itemsize
    if zero.stage in (1, 2):
        return (2 if zero.overlap else 1) * min(zero.reduce_bucket, trained) * width
    return 0


def _step(rank_model: RankModel, zero: ZeroSettings, optimizer: str, world_size: int) -> int:
    """What the largest flat tensor that is stepped at once needs; on the device, so nothing with offload.

    An fp32 copy of its gradient where gradients are summed in bf16, and AdamW's temporaries.
    """
    if zero.offload_optimizer:
        return 0
    trained = [p for p in rank_model.model.parameters() if p.requires_grad]
    if zero.stage == 3:
        stepped = max(sub_groups(trained, rank_model, zero, lambda p: partition(p, rank_model, world_size)))
    else:
        stepped = -(-sum(p.numel() for p in trained) // (world_size if zero.stage else 1))
    copies = 0 if rank_model.dtype.itemsize == FP32 else 1
    return FP32 * stepped * (copies + (ADAMW_TEMPORARIES if optimizer == "adamw" else 0))
