"""Experts on their own ranks: who owns which, and how owners and tokens meet.

Rank p of an expert-parallel group of n ranks owns the experts p k/n to (p + 1) k/n of every layer: their values,
gradients and optimizer state. Under ZeRO-3 a rank's own part is partitioned over the group's replicas, or, with
`replicate`, whole on each of them. What all experts share (A, router, M) stays data-parallel: partitioned over all
ranks. A token needs every expert, so

    weights   whole matrices are gathered over the group, a decoder layer's at once and one layer ahead, for forward
              and again for backward; their gradients are summed at the owners, a decoder layer's at once
    tokens    gated activations go to the owners, which send back their share of the output
    auto      whichever is the cheaper for the tokens of this forward, decided alike on every rank of a group

A layer's shared parameters are gathered together with its experts, not module by module as ZeRO-3's hooks would.
Gathered values live for one layer's work. What autograd sees in their place is an edge: a tensor of the right shape
with one element behind it, whose gradient leads to the owners (`_Edges`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from trainer.adapters.layer import Experts
from trainer.distributed.expert_shard import ExpertGroups, ExpertShard, Gather
from trainer.distributed.token_dispatcher import TokenDispatcher

Dispatch = Literal["auto", "weights", "tokens"]
PARAMETERS = ("lora_a", "router", "interaction", "experts")  # of `Experts`, as `gated_experts` takes them
SendHome = Callable[[Sequence[Tensor]], Sequence[Tensor]]


class ExpertParallelLayer:
    """The adapters' parameters of one decoder layer: gathered, and their gradients sent home, together."""

    def __init__(self, placement: "ExpertParallel", index: int) -> None:
        self.placement, self.index = placement, index
        self.held: list[ExpertShard] = []
        self._is_experts: list[bool] = []  # MoELoRA's A_i travel whatever the dispatch
        self._learned: list[Tensor] = []
        self._edges: tuple[Tensor, ...] = ()
        self._served: set[int] = set()

    def take(self, module: Experts, name: str, by_expert: bool) -> int | None:
        """Holds a parameter of `module` from here on; its position in this layer. None: there is no such parameter."""
        if getattr(module, name) is None:
            return None
        held = ExpertShard(getattr(module, name), self.placement.groups, by_expert)
        delattr(module, name)
        setattr(module, name, held)
        self.held.append(held)
        self._is_experts.append(name == "experts")
        return len(self.held) - 1

    @property
    def experts(self) -> list[ExpertShard]:
        return [held for held, is_experts in zip(self.held, self._is_experts, strict=True) if is_experts]

    @property
    def travel(self) -> list[bool]:
        by_weights = self.placement.exchange is None
        return [
            held.by_expert and (by_weights or not experts)
            for held, experts in zip(self.held, self._is_experts, strict=True)
        ]

    def edges(self, asking: int) -> tuple[Tensor, ...]:
        """The tensors that stand for parameters in autograd's graph, one set for each pass through the layer.

        asking: position of the first parameter that is wanted. It is asked for once in a pass: asked for again, it is
        in another one (activation checkpointing).
        """
        if not self._edges or asking in self._served:
            travel = self.travel
            shapes = [held.shape if t else held.own_shape for held, t in zip(self.held, travel, strict=True)]
            self._edges = _Edges.apply(shapes, partial(self._send_home, travel), *self._learned)
            self._served = set()
        self._served.add(asking)
        return self._edges

    def begin_forward(self, learned: list[Tensor]) -> None:
        """learned: where this forward's gradient of each `own` goes."""
        self._learned, self._edges = learned, ()

    def _send_home(self, travel: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of all experts, summed over the group at their owners; with `replicate`, over replicas as well.

        DeepSpeed divides by all ranks, and sums over those among which it partitions.
        """
        groups = self.placement.groups
        home = list(gradients)
        travelling = [i for i, travels in enumerate(travel) if travels]
        if travelling:
            parts = [gradients[i].reshape(groups.size, -1) for i in travelling]
            summed = _sum_at_owner(torch.cat(parts, 1), groups.parallel)
            for i, own in zip(travelling, summed.split([part.shape[1] for part in parts]), strict=True):
                home[i] = own
        if groups.replicate and groups.replicas.size() > 1:
            by_expert = [i for i, held in enumerate(self.held) if held.by_expert]
            flat = torch.cat([home[i].reshape(-1) for i in by_expert])
            dist.all_reduce(flat, group=groups.replicas)
            for i, own in zip(by_expert, flat.split([self.held[i].own_numel for i in by_expert]), strict=True):
                home[i] = own
        return [gradient.reshape(held.own_shape) for gradient, held in zip(home, self.held, strict=True)]


class _Edges(torch.autograd.Function):
    """What ranks learn in, stand-ins of the given shapes out; backward turns gradients of these into those of that."""

    @staticmethod
    def forward(ctx: Any, shapes: list[torch.Size], send_home: SendHome, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.send_home = send_home
        return tuple(mine.new_empty(1).expand(shape) for mine, shape in zip(own, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.send_home(gradients)


@dataclass(frozen=True)
class ExpertParallelParameters:
    """What one `Experts` has its parameters from (trainer.adapters.fused.Placed); positions are in its layer."""

    layer: ExpertParallelLayer
    positions: tuple[int | None, ...]  # None where there is no such parameter

    @property
    def exchange(self) -> TokenDispatcher | None:
        return self.layer.placement.exchange

    def edges(self) -> list[Tensor | None]:
        return self._mine(self.layer.edges(self.positions[0]))

    def values(self, backward: bool) -> list[Tensor | None]:
        return self._mine(self.layer.placement.fetch(self.layer.index, backward))

    def _mine(self, of_layer: Sequence[Tensor]) -> list[Tensor | None]:
        return [None if position is None else of_layer[position] for position in self.positions]


class ExpertParallel:
    """All placed matrices of a model, and what is on its way of them.

    Made before the model is handed to ZeRO-3, whose shards it reads. Each forward of the model's decoder begins with a
    small collective of the group where its token counts matter (dispatch tokens or auto).
    """

    def __init__(self, model: PeftModel, groups: ExpertGroups, dispatch: Dispatch) -> None:
        self.groups, self.dispatch = groups, dispatch
        self.exchange: TokenDispatcher | None = None
        self.layers: list[ExpertParallelLayer] = []
        self._place(model)
        # {training: the largest number of tokens a rank for which tokens travel}; `autotune` measures it instead
        self.tokens_up_to = {training: self._by_bytes(training) for training in (False, True)}
        self._at: int | None = None
        self._values: list[Tensor] = []
        self._direction = 1
        self._ahead: tuple[int, Gather] | None = None
        # of the decoder, not of PEFT's model: generation does not pass through that
        decoder = model.get_base_model().get_decoder()
        decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True)

    @property
    def by_expert(self) -> list[nn.Parameter]:
        """The parameters that differ between the ranks of a group."""
        return [held.own for layer in self.layers for held in layer.held if held.by_expert]

    def describe(self) -> str:
        """Where experts are and what travels, for a person."""
        k = self.layers[0].experts[0].shape[0]
        place = f"{k // self.groups.size} of {k} on each of {self.groups.size} ranks, {self.groups.replicas.size()} "
        kept = "whole" if self.groups.replicate else "partitioned"
        rule = f"{self.dispatch} travel"
        if self.dispatch == "auto":
            rule = f"tokens travel up to {self.tokens_up_to[True]} a rank ({self.tokens_up_to[False]} in evaluation)"
            rule += ", weights above"
        return f"{place}replicas, {kept} on each; {rule}"

    def fetch(self, index: int, backward: bool) -> list[Tensor]:
        """The matrices of one decoder layer; starts the next one's gather, in the direction of travel."""
        if index != self._at:
            self._direction = -1 if self._at is not None and index < self._at else 1
            gather = self._take_ahead(index) or self._gather(index)
            self._at, self._values = index, gather.wait()
            self._look_ahead()
        elif backward and self._direction > 0:  # the last layer: here forward turns into backward
            self._direction = -1
            self._look_ahead()
        elif self._ahead is not None:
            self._ahead[1].advance()
        return self._values

    def _by_bytes(self, training: bool) -> int:
        """The largest number of tokens a rank for which `tokens` moves no more elements than `weights`."""
        n = self.groups.size
        experts = [held.shape for layer in self.layers for held in layer.experts]
        weights = sum(shape.numel() for shape in experts) / n * (3 if training else 1)
        a_token = sum(k * rank / n + width for k, rank, width in experts) * (2 if training else 1)
        return int(weights // a_token)

    def _place(self, model: nn.Module) -> None:
        by_layer: dict[str, ExpertParallelLayer] = {}
        for name, module in model.named_modules():
            if not isinstance(module, Experts):
                continue
            layer = by_layer.setdefault(_decoder_layer(name), ExpertParallelLayer(self, len(by_layer)))
            by_expert = {"experts", *(["lora_a"] if module.a_by_expert else [])}
            positions = [layer.take(module, name, name in by_expert) for name in PARAMETERS]
            module.placed = ExpertParallelParameters(layer, tuple(positions))
        self.layers = list(by_layer.values())

    def _begin_forward(self, _model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._take_ahead(None)
        self._at, self._values = None, []
        self._make_edges()
        self.exchange = self._choose(_tokens_in(args, kwargs))

    def _make_edges(self) -> None:
        """One node of autograd's graph for all experts: their gradients reach ZeRO-3 together when backward ends.

        ZeRO-3 reduces gradients in buckets, and closes one wherever the next gradient belongs to another group.
        """
        every = [held for layer in self.layers for held in layer.held]
        for held in every:
            held.hide()
        by_expert = [held for held in every if held.by_expert]
        shapes = [held.own_shape for held in by_expert]
        edges = iter(_Edges.apply(shapes, tuple, *(held.own for held in by_expert)))
        for layer in self.layers:
            layer.begin_forward([next(edges) if held.by_expert else held.own for held in layer.held])

    def _choose(self, tokens: int) -> TokenDispatcher | None:
        """What this forward exchanges by; None where weights travel."""
        up_to = self.tokens_up_to[torch.is_grad_enabled()]
        if self.dispatch == "weights" or (self.dispatch == "auto" and up_to == 0):
            return None
        device = self.layers[0].held[0].own.device
        counts = torch.empty(self.groups.size, dtype=torch.long, device=device)
        dist.all_gather_into_tensor(counts, torch.tensor([tokens], device=device), group=self.groups.parallel)
        if self.dispatch == "auto" and int(counts.max()) > up_to:
            return None
        return TokenDispatcher(self.groups.parallel, tuple(counts.tolist()))

    def _gather(self, index: int) -> Gather:
        layer = self.layers[index]
        return Gather(layer.held, layer.travel, layer.held[0].own.device)

    def _look_ahead(self) -> None:
        """Starts the gather of the next layer; a wrong guess is waited for and dropped, alike on every rank."""
        following = self._at + self._direction
        self._take_ahead(None)
        if 0 <= following < len(self.layers):
            self._ahead = following, self._gather(following)

    def _take_ahead(self, index: int | None) -> Gather | None:
        if self._ahead is None:
            return None
        (expected, gather), self._ahead = self._ahead, None
        if expected == index:
            return gather
        gather.wait()
        return None


def _decoder_layer(name: str) -> str:
    """model.layers.11.mlp.gate_proj... -> model.layers.11; a module in no numbered layer is a layer of its own."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def _tokens_in(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Tokens [batch x seq] of a decoder's forward."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:-1].numel()


def _sum_at_owner(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """parts [n, length], row j for rank j -> the sum [length] of all ranks' rows for this one.

    Moves what a reduce-scatter moves, (n - 1) / n of the elements; added in the order of ranks, in fp32 or better,
    so that a rerun gives the same bits.
    """
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received.sum(0, dtype=torch.promote_types(parts.dtype, torch.float32)).to(parts.dtype)
