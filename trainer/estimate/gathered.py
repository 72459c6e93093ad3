"""Parameters that ZeRO-3 (DeepSpeed 0.19.8) makes whole on a rank, and for how long: more than the layer at work.

From the second step on each module's fetch starts another prefetch bucket, without looking at what came before, until
stage3_max_live_parameters elements are whole. A decoder layer has a dozen such modules, so that gathers run ahead of
the work; and what they meet on their way that is whole already is not released, since its use in backward was passed.
So a model below that limit is gathered once, in forward, and released layer by layer in backward.

Besides, autograd keeps the weight of a plain frozen linear for backward as a view, which ZeRO-3's release does not
free: without checkpointing an unquantised base is whole when forward ends, however small the limit. NF4 linears keep
the parameter itself, which is emptied.
"""

from torch import nn

from trainer.base.nf4 import NF4Linear
from trainer.estimate.rank_model import RankModel
from trainer.estimate.zero_settings import ZeroSettings


def gathered_bytes(rank_model: RankModel, zero: ZeroSettings, checkpointing: bool) -> int:
    """Whole parameters where forward turns into backward: an upper bound."""
    fetched = _fetched(rank_model, checkpointing)
    elements, size = sum(p.numel() for p in fetched), sum(map(_bytes, fetched))
    if zero.prefetch_bucket and elements <= zero.max_live:
        return size
    ahead = size * zero.max_live // elements if zero.prefetch_bucket else 0
    largest = max(module_bytes(layer) for layer in decoder_layers(rank_model.model))
    head = module_bytes(rank_model.model.get_base_model().get_output_embeddings())
    return max(largest, ahead) + head + (0 if checkpointing else _kept_by_autograd(rank_model.model))


def arriving_bytes(rank_model: RankModel, zero: ZeroSettings) -> int:
    """One bucket of gathered parameters beside the copies that are made of them."""
    parameters = list(rank_model.model.parameters())
    layer = max(decoder_layers(rank_model.model), key=module_bytes)
    return max(*map(_bytes, parameters), _bucket(layer, zero.prefetch_bucket))


def placed_bytes(rank_model: RankModel) -> int:
    """All adapters of the decoder layer at work and of the one ahead, where experts are placed."""
    if rank_model.placement is None:
        return 0
    widest = max(sum(shard.shape.numel() for shard in layer.shards) for layer in rank_model.placement.layers)
    return 2 * widest * rank_model.dtype.itemsize


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The layers of the decoder, which ZeRO-3 gathers one after the other."""
    decoder = model.get_base_model().get_decoder()
    lists = [m for m in decoder.modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(map(module_bytes, modules))))


def module_bytes(module: nn.Module) -> int:
    return sum(map(_bytes, module.parameters()))


def _fetched(rank_model: RankModel, checkpointing: bool) -> list[nn.Parameter]:
    """What ZeRO-3's own hooks gather and backward needs; placed adapters are gathered by their placement.

    The embedding only with checkpointing, for which transformers makes its output want a gradient.
    """
    base = rank_model.model.get_base_model()
    embedding, head = base.get_input_embeddings().weight, base.get_output_embeddings().weight
    without = embedding if embedding is not head and not checkpointing else None
    placed = rank_model.placement is not None
    return [p for p in rank_model.model.parameters() if p is not without and not (placed and p.requires_grad)]


def _kept_by_autograd(model: nn.Module) -> int:
    linears = (m for layer in decoder_layers(model) for m in layer.modules() if isinstance(m, nn.Linear))
    return sum(_bytes(linear.weight) for linear in linears if not isinstance(linear, NF4Linear))


def _bucket(layer: nn.Module, elements: int) -> int:
    """Bytes of so many elements of a layer, or of the whole layer where it has fewer."""
    numel = sum(p.numel() for p in layer.parameters())
    return module_bytes(layer) * min(elements, numel) // numel


def _bytes(parameter: nn.Parameter) -> int:
    return parameter.numel() * parameter.element_size()
