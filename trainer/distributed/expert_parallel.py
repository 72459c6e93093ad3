"""Expert parallelism: which rank owns which experts, and how experts and tokens come together.

Rank p of an expert-parallel group of n ranks owns the experts p k/n to (p + 1) k/n of every layer: their values,
gradients and optimizer state. Under ZeRO-3 a rank's own part is partitioned over the group's replicas, or, with
`replicate`, whole on each of them. What all experts share (A, router, M) stays data-parallel. Where each is divided is
said in trainer.distributed.adapter_groups. A token needs every expert, so one of two things travels:

    weights   whole matrices are gathered over the group, one decoder layer at a time and one layer ahead of use, for
              forward and again for backward; their gradients are summed at the owners, one decoder layer at a time
    tokens    gated activations go to the owners, which send back their share of the output
    auto      the cheaper of the two for the tokens of this forward; every rank of a group decides the same

A layer's shared parameters are gathered together with its experts, not module by module as ZeRO-3's hooks would. So is
all of an adapter without placement, which is a group of one rank: few large messages instead of many small ones.
Gathered values live only while one layer is at work. Autograd sees an edge in their place: a tensor of the right shape
with one element behind it, whose gradient leads to the owners (`_Edges`).
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedModel

from trainer.adapters.fused import Parameters
from trainer.adapters.layer import Experts
from trainer.distributed.adapter_groups import AdapterGroups, sum_at_owner
from trainer.distributed.expert_shard import ExpertShard, LayerGather
from trainer.distributed.token_dispatcher import TokenDispatcher
from trainer.recipe import Recipe

Dispatch = Literal["auto", "weights", "tokens"]
PARAMETERS = ("lora_a", "router", "interaction", "experts")  # of `Experts`, as `gated_experts` takes them
SendToOwners = Callable[[Sequence[Tensor]], Sequence[Tensor]]


def gathers_by_layer(recipe: Recipe, stage: int | None, groups: AdapterGroups) -> bool:
    """Whether adapters are gathered by decoder layer. ZeRO-3's hooks gather those of method lora, which are PEFT's.

    stage: of ZeRO.
    """
    divided = groups.size > 1 or groups.shared.among.size() > 1
    return stage == 3 and divided and recipe.adapter.method != "lora"


class ExpertParallelLayer:
    """The adapter parameters of one decoder layer: gathered together, their gradients sent to the owners together."""

    def __init__(self, expert_parallel: "ExpertParallel", index: int) -> None:
        self.expert_parallel, self.index = expert_parallel, index
        self.shards: list[ExpertShard] = []
        self._is_experts: list[bool] = []  # MoELoRA's A_i travel whatever the dispatch
        self._learned: list[Tensor] = []
        self._edges: tuple[Tensor, ...] = ()
        self._served: set[int] = set()

    def take(self, module: Experts, name: str, by_expert: bool) -> int | None:
        """Replaces a parameter of `module` by a shard; returns its position here, None where there is no such one."""
        if getattr(module, name) is None:
            return None
        groups = self.expert_parallel.groups
        shard = ExpertShard(getattr(module, name), groups, by_expert and groups.size > 1)
        delattr(module, name)
        setattr(module, name, shard)
        self.shards.append(shard)
        self._is_experts.append(name == "experts")
        return len(self.shards) - 1

    @property
    def experts(self) -> list[ExpertShard]:
        return [shard for shard, is_experts in zip(self.shards, self._is_experts, strict=True) if is_experts]

    @property
    def travel(self) -> list[bool]:
        """For each shard, whether other owners' parts are gathered in this forward."""
        by_weights = self.expert_parallel.dispatcher is None
        return [
            shard.by_expert and (by_weights or not experts)
            for shard, experts in zip(self.shards, self._is_experts, strict=True)
        ]

    def edges(self, position: int) -> tuple[Tensor, ...]:
        """The tensors that stand for parameters in autograd's graph, one set for each pass through the layer.

        position: of the first parameter that the caller wants. Each is wanted once per pass, so a second request for
        the same one begins another pass (activation checkpointing).
        """
        if not self._edges or position in self._served:
            travel = self.travel
            shapes = [shard.shape if t else shard.own_shape for shard, t in zip(self.shards, travel, strict=True)]
            self._edges = _Edges.apply(shapes, partial(self._send_to_owners, travel), *self._learned)
            self._served = set()
        self._served.add(position)
        return self._edges

    def begin_forward(self, learned: list[Tensor]) -> None:
        """learned: the tensors that receive this forward's gradient of each shard's `own`."""
        self._learned, self._edges = learned, ()

    def _send_to_owners(self, travel: Sequence[bool], gradients: Sequence[Tensor]) -> list[Tensor]:
        """Gradients of all experts, summed over the group at their owners."""
        groups = self.expert_parallel.groups
        own_gradients = list(gradients)
        travelling = [i for i, travels in enumerate(travel) if travels]
        if travelling:
            parts = [gradients[i].reshape(groups.size, -1) for i in travelling]
            summed = sum_at_owner(torch.cat(parts, 1), groups.parallel)
            for i, own in zip(travelling, summed.split([part.shape[1] for part in parts]), strict=True):
                own_gradients[i] = own
        return [gradient.reshape(s.own_shape) for gradient, s in zip(own_gradients, self.shards, strict=True)]


class _Edges(torch.autograd.Function):
    """Takes each shard's `own`, returns stand-ins of the given shapes; backward sends their gradients to the owners."""

    @staticmethod
    def forward(ctx: Any, shapes: list[torch.Size], send_to_owners: SendToOwners, *own: Tensor) -> tuple[Tensor, ...]:
        ctx.send_to_owners = send_to_owners
        return tuple(mine.new_empty(1).expand(shape) for mine, shape in zip(own, shapes, strict=True))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.send_to_owners(gradients)


@dataclass(frozen=True)
class ExpertParallelParameters:
    """Where one `Experts` module gets its parameters (trainer.adapters.fused.RemoteParameters).

    positions: of lora_a, router, interaction (None where there is none) and experts in the layer.
    """

    layer: ExpertParallelLayer
    positions: tuple[int, int, int | None, int]

    @property
    def dispatcher(self) -> TokenDispatcher | None:
        return self.layer.expert_parallel.dispatcher

    def edges(self) -> Parameters:
        return self._mine(self.layer.edges(self.positions[0]))

    def values(self, backward: bool) -> Parameters:
        return self._mine(self.layer.expert_parallel.fetch(self.layer.index, backward))

    def _mine(self, of_layer: Sequence[Tensor]) -> Parameters:
        lora_a, router, interaction, experts = self.positions
        mixing = None if interaction is None else of_layer[interaction]
        return of_layer[lora_a], of_layer[router], mixing, of_layer[experts]


class ExpertParallel:
    """All adapter parameters of a model, and the gathers that are under way.

    Made before the model is handed to ZeRO-3, whose shards it reads. Where token counts matter (dispatch tokens or
    auto), each forward of the decoder begins with a small collective of the group's hosts.
    """

    def __init__(self, model: PeftModel, groups: AdapterGroups, dispatch: Dispatch) -> None:
        self.groups = groups
        self.dispatch: Dispatch = dispatch if groups.size > 1 else "weights"
        self.dispatcher: TokenDispatcher | None = None  # of this forward; None where weights travel
        self.layers: list[ExpertParallelLayer] = []
        self._place(model)
        # {training: the largest number of tokens per rank for which tokens travel}; `autotune` measures it instead
        self.tokens_up_to = {training: self._by_bytes(training) for training in (False, True)}
        self._at: int | None = None  # index of the layer at work
        self._values: list[Tensor] = []
        self._direction = 1
        self._ahead: tuple[int, LayerGather] | None = None
        # a hook on the decoder, not on PEFT's model, which generation does not pass through
        decoder = cast(PreTrainedModel, model.get_base_model()).get_decoder()
        decoder.register_forward_pre_hook(self._begin_forward, with_kwargs=True)

    @property
    def by_expert(self) -> list[nn.Parameter]:
        """The parameters that differ between the ranks of a group."""
        return [shard.learned for layer in self.layers for shard in layer.shards if shard.by_expert]

    def describe(self) -> str:
        """One line for users: where placed experts are and what travels."""
        k, owners = self.layers[0].experts[0].shape[0], self.groups.experts
        place = f"{k // self.groups.size} of {k} on each of {self.groups.size} ranks, {owners.ranks} "
        kept = "whole" if owners.copies is not None and owners.among.size() == 1 else "partitioned"
        rule = f"{self.dispatch} travel"
        if self.dispatch == "auto":
            rule = f"tokens travel up to {self.tokens_up_to[True]} per rank ({self.tokens_up_to[False]} in evaluation)"
            rule += ", weights above"
        return f"{place}replicas, {kept} on each; {rule}"

    def fetch(self, index: int, backward: bool) -> list[Tensor]:
        """Gathers one decoder layer's parameters and starts the next layer's gather, in the direction of travel.

        Collective: every rank of the group must call it for the same layers in the same order.
        """
        if index != self._at:
            self._direction = -1 if self._at is not None and index < self._at else 1
            gather = self._take_ahead(index) or self._gather(index)
            self._at, self._values = index, gather.wait()
            self._look_ahead(index)
        elif backward and self._direction > 0:  # the last layer: here forward turns into backward
            self._direction = -1
            self._look_ahead(index)
        elif self._ahead is not None:
            self._ahead[1].advance()
        return self._values

    def _by_bytes(self, training: bool) -> int:
        """The largest number of tokens per rank for which `tokens` moves no more elements than `weights`."""
        n = self.groups.size
        experts = [shard.shape for layer in self.layers for shard in layer.experts]
        weights = sum(shape.numel() for shape in experts) / n * (3 if training else 1)
        per_token = sum(k * rank / n + width for k, rank, width in experts) * (2 if training else 1)
        return int(weights // per_token)

    def _place(self, model: nn.Module) -> None:
        by_layer: dict[str, ExpertParallelLayer] = {}
        for name, module in model.named_modules():
            if not isinstance(module, Experts):
                continue
            layer = by_layer.setdefault(_decoder_layer(name), ExpertParallelLayer(self, len(by_layer)))
            by_expert = {"experts", *(["lora_a"] if module.a_by_expert else [])}
            positions = [layer.take(module, name, name in by_expert) for name in PARAMETERS]
            lora_a, router, interaction, experts = positions
            assert lora_a is not None and router is not None and experts is not None  # every method has them
            module.remote = ExpertParallelParameters(layer, (lora_a, router, interaction, experts))
        self.layers = list(by_layer.values())

    def _begin_forward(self, _model: nn.Module, args: Sequence[Any], kwargs: dict[str, Any]) -> None:
        self._take_ahead(None)
        self._at, self._values = None, []
        self._make_edges()
        self.dispatcher = self._choose(_tokens_in(args, kwargs))

    def _make_edges(self) -> None:
        """Makes one node of autograd's graph for all experts: their gradients reach ZeRO-3 together as backward ends.

        ZeRO-3 reduces gradients in buckets, and closes one wherever the next gradient belongs to another group.
        """
        shards = [shard for layer in self.layers for shard in layer.shards]
        for shard in shards:
            shard.restore_shape()
        by_expert = [shard for shard in shards if shard.by_expert]
        shapes = [shard.own_shape for shard in by_expert]
        edges = iter(_Edges.apply(shapes, tuple, *(shard.learned for shard in by_expert)))
        for layer in self.layers:
            layer.begin_forward([next(edges) if shard.by_expert else shard.learned for shard in layer.shards])

    def _choose(self, tokens: int) -> TokenDispatcher | None:
        """This forward's dispatcher of tokens; None where weights travel."""
        up_to = self.tokens_up_to[torch.is_grad_enabled()]
        if self.dispatch == "weights" or (self.dispatch == "auto" and up_to == 0):
            return None
        counts = torch.empty(self.groups.size, dtype=torch.long)
        dist.all_gather_into_tensor(counts, torch.tensor([tokens]), group=self.groups.hosts)
        if self.dispatch == "auto" and int(counts.max()) > up_to:
            return None
        return TokenDispatcher(self.groups.parallel, tuple(counts.tolist()))

    def _gather(self, index: int) -> LayerGather:
        layer = self.layers[index]
        return LayerGather(layer.shards, layer.travel, layer.shards[0].learned.device)

    def _look_ahead(self, index: int) -> None:
        """Starts the gather of the layer after `index`; one that was guessed wrong is waited for and dropped.

        Every rank guesses the same.
        """
        following = index + self._direction
        self._take_ahead(None)
        if 0 <= following < len(self.layers):
            self._ahead = following, self._gather(following)

    def _take_ahead(self, index: int | None) -> LayerGather | None:
        if self._ahead is None:
            return None
        (expected, gather), self._ahead = self._ahead, None
        if expected == index:
            return gather
        gather.wait()
        return None


def _decoder_layer(name: str) -> str:
    """model.layers.11.mlp.gate_proj... -> model.layers.11; a module outside numbered layers is a layer of its own."""
    found = re.match(r".*?\.\d+(?=\.)", name)
    return found.group() if found else name


def _tokens_in(args: Sequence[Any], kwargs: dict[str, Any]) -> int:
    """Tokens [batch x seq] of a decoder's forward."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    return ids.numel() if ids is not None else kwargs["inputs_embeds"].shape[:-1].numel()
