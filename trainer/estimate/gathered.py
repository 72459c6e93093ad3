"""Parameters that ZeRO-3 (DeepSpeed 0.19.8) holds whole on each rank: more than the layer at work.

From the second step on, each module's fetch starts another prefetch bucket, whatever was prefetched before, until
stage3_max_live_parameters elements are whole. A decoder layer has a dozen such modules, so gathers run far ahead of the
computation. Prefetched parameters that are already whole are not released, because their use in backward has been
passed. So a model below that limit is gathered once, in forward, and released layer by layer in backward.

In addition, autograd saves the weight of a plain frozen linear for backward as a view, which ZeRO-3's release does not
free: without checkpointing an unquantised base is whole when forward ends, however small the limit. NF4 linears save
the parameter itself, which ZeRO-3 empties.
"""

from collections.abc import Iterable

from torch import Tensor, nn

from trainer.base.nf4 import NF4Linear
from trainer.estimate.rank_model import RankModel, module_bytes
from trainer.estimate.zero_settings import ZeroSettings


def is_gathered_once(rank_model: RankModel, zero: ZeroSettings) -> bool:
    """Whether a micro-batch gathers each parameter once, and not again for backward."""
    return bool(zero.prefetch_bucket) and sum(p.numel() for p in rank_model.model.parameters()) <= zero.max_live


def gathered_bytes(rank_model: RankModel, zero: ZeroSettings, checkpointing: bool) -> int:
    """Bytes of whole parameters where forward turns into backward: an upper bound."""
    fetched = _fetched(rank_model, checkpointing)
    elements, size = sum(p.numel() for p in fetched), _copied_bytes(fetched, zero)
    if zero.prefetch_bucket and elements <= zero.max_live:
        return size
    ahead = size * zero.max_live // elements if zero.prefetch_bucket else 0
    hooked = set(fetched)
    largest = max(_copied_bytes(hooked & set(layer.parameters()), zero) for layer in rank_model.decoder_layers)
    kept = 0 if checkpointing else _kept_by_autograd(rank_model, zero)
    return max(largest, ahead) + _copied_bytes(rank_model.head.parameters(), zero) + kept


def arriving_bytes(rank_model: RankModel, zero: ZeroSettings) -> int:
    """One bucket of gathered parameters, which exists beside the copies made of it."""
    layer = max(rank_model.decoder_layers, key=module_bytes)
    return max(*map(_bytes, rank_model.model.parameters()), _bucket(layer, zero.prefetch_bucket))


def placed_bytes(rank_model: RankModel) -> int:
    """Where they are gathered by decoder layer: all adapters of the layer at work and of the next one."""
    if rank_model.expert_parallel is None:
        return 0
    widest = max(sum(shard.shape.numel() for shard in layer.shards) for layer in rank_model.expert_parallel.layers)
    return 2 * widest * rank_model.dtype.itemsize


def _fetched(rank_model: RankModel, checkpointing: bool) -> list[nn.Parameter]:
    """What ZeRO-3's own hooks gather and backward needs; adapters may be gathered by decoder layer instead.

    The embedding counts only with checkpointing, for which transformers makes its output require a gradient.
    """
    embedding = rank_model.embedding
    without = embedding if embedding is not rank_model.head.weight and not checkpointing else None
    by_layer = rank_model.expert_parallel is not None
    return [p for p in rank_model.model.parameters() if p is not without and not (by_layer and p.requires_grad)]


def _kept_by_autograd(rank_model: RankModel, zero: ZeroSettings) -> int:
    modules = (m for layer in rank_model.decoder_layers for m in layer.modules() if not isinstance(m, NF4Linear))
    return _copied_bytes((m.weight for m in modules if isinstance(m, nn.Linear)), zero)


def _copied_bytes(parameters: Iterable[Tensor], zero: ZeroSettings) -> int:
    """Bytes of what ZeRO-3 puts together: a base that is whole on each rank is used where it lies."""
    in_place = zero.shard_group == 1 and not zero.offload_param
    return sum(_bytes(p) for p in parameters if p.requires_grad or not in_place)


def _bucket(layer: nn.Module, elements: int) -> int:
    """Bytes of `elements` elements of a layer, or of the whole layer if it has fewer."""
    numel = sum(p.numel() for p in layer.parameters())
    return module_bytes(layer) * min(elements, numel) // numel


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
