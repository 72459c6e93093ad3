"""Bytes that come and go within a step: formulas, each an upper bound of one thing.

Two moments can be the highest. In the head, all activations are kept while logits and their gradients stand. In a
decoder layer's backward, its parameters are gathered, the next ones on their way, one weight is dequantised, and with
checkpointing the layer keeps again what it would have kept. In the optimizer step there are none of these, but
gradients in fp32.
"""

from dataclasses import dataclass

import torch
from torch import nn

from trainer.base.nf4 import BLOCK, NF4Linear
from trainer.estimate.activations import Activations
from trainer.estimate.model import RankModel
from trainer.estimate.resident import FP32, partition, sub_groups
from trainer.estimate.zero import ZeroSettings
from trainer.recipe import Recipe

# fp32 values a logit: themselves, their log-softmax and its gradient; beside them two in the compute dtype (logits
# and their gradient).
FP32_LOGITS, LOGITS = 3, 2


@dataclass(frozen=True)
class Transient:
    """Device bytes by term; `peak` adds up those that stand at the same time."""

    activations: int
    logits: int
    gathered_head: int
    gathered_layer: int
    recomputed: int
    prefetch: int
    working: int
    gradient_buckets: int
    step: int

    @property
    def by_name(self) -> dict[str, int]:
        """The terms that stand in the highest moment."""
        if self.step == self.peak:
            return {"gradients in fp32, at the step": self.step}
        if self._head >= self._layer:
            moment = {"logits and loss": self.logits, "gathered head": self.gathered_head}
        else:
            moment = {
                "gathered layer": self.gathered_layer,
                "recomputed layer": self.recomputed,
                "working set of a layer": self.working,
                "gradients on their way": self.gradient_buckets,
            }
        return {"activations": self.activations, **moment, "prefetch": self.prefetch}

    @property
    def _head(self) -> int:
        return self.logits + self.gathered_head

    @property
    def _layer(self) -> int:
        return self.gathered_layer + self.recomputed + self.working + self.gradient_buckets

    @property
    def peak(self) -> int:
        return max(self.activations + self.prefetch + max(self._head, self._layer), self.step)


def transient(
    rank_model: RankModel, kept: Activations, zero: ZeroSettings, recipe: Recipe, world_size: int
) -> Transient:
    """Of a rank's micro-batch of rows filled to data.seq_len, every token labelled."""
    model, width = rank_model.model, rank_model.dtype.itemsize
    checkpointing = recipe.train.activation_checkpointing
    tokens = recipe.train.micro_batch_size * recipe.data.seq_len
    head = model.get_base_model().get_output_embeddings()
    sharded = zero.stage == 3 and (world_size > 1 or zero.offload_param)
    layers = decoder_layers(model)
    prefetch = min(zero.prefetch_bucket, max(_elements(layer) for layer in layers)) if sharded else 0
    return Transient(
        activations=kept.saved(checkpointing),
        logits=tokens * head.out_features * (FP32_LOGITS * FP32 + LOGITS * width),
        gathered_head=_bytes(head) if sharded else 0,
        gathered_layer=gathered_layer_bytes(rank_model) if sharded else 0,
        recomputed=kept.layer if checkpointing else 0,
        prefetch=prefetch * (1 if recipe.base.quantization == "nf4" else width),
        working=dequantised_bytes(model, rank_model.dtype) + backward_bytes(model, tokens, width),
        gradient_buckets=_buckets(rank_model, zero),
        step=_fp32_gradients(rank_model, zero, world_size),
    )


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder, which ZeRO-3 gathers one after the other."""
    decoder = model.get_base_model().get_decoder()
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(map(_elements, modules))))


def gathered_layer_bytes(rank_model: RankModel) -> int:
    """The largest decoder layer whole; with placement, its adapters also one layer ahead and all experts of them."""
    largest = max(map(_bytes, decoder_layers(rank_model.model)))
    if rank_model.placement is None:
        return largest
    width = rank_model.dtype.itemsize
    placed = max(sum(held.shape.numel() for held in layer.held) for layer in rank_model.placement.layers) * width
    return largest + 2 * placed


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


def _fp32_gradients(rank_model: RankModel, zero: ZeroSettings, world_size: int) -> int:
    """Where gradients are summed in bf16: the optimizer's fp32 copy of those that it steps at once."""
    if rank_model.dtype.itemsize == FP32 or zero.offload_optimizer:
        return 0
    trained = [p for p in rank_model.model.parameters() if p.requires_grad]
    if zero.stage == 3:
        flat = sub_groups(trained, rank_model, zero, lambda p: partition(p, rank_model, world_size))
        return FP32 * max(flat)
    return FP32 * -(-sum(p.numel() for p in trained) // (world_size if zero.stage else 1))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())


def _elements(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())
