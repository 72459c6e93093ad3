"""The adapted model as each rank holds it, built by the training code with every parameter on the meta device."""

from dataclasses import dataclass
from functools import cached_property
from typing import cast

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig, PreTrainedModel

from trainer.adapters.attach import attach_on_meta, check_adapter
from trainer.base.loader import pack_linears, tie
from trainer.base.weight_map import DTYPES, skeleton
from trainer.distributed.adapter_groups import AdapterGroups, Division
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.recipe import TAKE_LENGTHS, BaseModelConfig, ExpertsConfig, Recipe


@dataclass(frozen=True)
class RankModel:
    """model: adapted, with parameters on meta; tied weights are one parameter. dtype: of computation.

    expert_parallel: None where adapters are not gathered by decoder layer. groups: of sizes without process groups
    behind them.
    """

    model: PeftModel
    config: PretrainedConfig
    dtype: torch.dtype
    expert_parallel: ExpertParallel | None
    groups: AdapterGroups

    @cached_property
    def by_expert(self) -> set[nn.Parameter]:
        """Parameters of placed experts."""
        return set(self.expert_parallel.by_expert) if self.expert_parallel is not None else set()

    def division(self, parameter: nn.Parameter) -> Division:
        """Where the parts of a trained parameter are."""
        return self.groups.experts if parameter in self.by_expert else self.groups.shared

    @property
    def trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def trained_elements(self) -> int:
        """Elements of the whole adapter; of placed experts each rank builds its share only."""
        return sum(p.numel() * (self.groups.size if p in self.by_expert else 1) for p in self.trained)

    @property
    def embedding(self) -> nn.Parameter:
        """The input embedding's weight, [vocabulary, hidden]."""
        return cast(nn.Parameter, base_of(self.model).get_input_embeddings().weight)

    @property
    def head(self) -> nn.Linear:
        """The layer that computes logits; its weight may be `embedding`."""
        return cast(nn.Linear, base_of(self.model).get_output_embeddings())

    @property
    def decoder_layers(self) -> list[nn.Module]:
        return decoder_layers(self.model)


@dataclass(frozen=True)
class _GroupOfSize:
    """Stands in for a process group where only its size and this rank's place in it are read."""

    members: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return 0


def build_rank_model(config: PretrainedConfig, recipe: Recipe, groups: AdapterGroups, by_layer: bool) -> RankModel:
    """Builds what each rank builds; all ranks hold equally much. Raises UserError as a run would.

    by_layer: as `gathers_by_layer` has it.
    """
    model = build_base(config, recipe.base)
    check_adapter(model, recipe.adapter)
    adapted = attach_on_meta(model, recipe.adapter, DTYPES[recipe.base.dtype])
    expert_parallel = ExpertParallel(adapted, groups, recipe.experts.dispatch) if by_layer else None
    return RankModel(adapted, config, DTYPES[recipe.base.dtype], expert_parallel, groups)


def build_base(config: PretrainedConfig, base: BaseModelConfig) -> PreTrainedModel:
    """Builds the frozen base. sdpa replaces attention that needs a GPU, and has the same weights."""
    attention = "sdpa" if base.attention in TAKE_LENGTHS else base.attention
    model = skeleton(config, base.model_copy(update={"attention": attention}))
    if base.quantization == "nf4":
        pack_linears(model, DTYPES[base.dtype])
    tie(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def groups_without_ranks(experts: ExpertsConfig, world_size: int, shard_group: int) -> AdapterGroups:
    """As `make_adapter_groups`, with sizes only."""

    def division(among: int, ranks: int) -> Division:
        return Division(group(among), group(ranks // among) if ranks > among else None)

    def group(size: int) -> dist.ProcessGroup:
        return cast(dist.ProcessGroup, _GroupOfSize(size))

    size = experts.parallel_size
    among = 1 if experts.replicate else shard_group // size
    owners, shared = division(among, world_size // size), division(shard_group, world_size)
    return AdapterGroups(group(size), group(size), owners, shared)


def base_of(model: PeftModel) -> PreTrainedModel:
    return cast(PreTrainedModel, model.get_base_model())


def decoder_layers(model: PeftModel) -> list[nn.Module]:
    """The decoder's layers, which ZeRO-3 gathers one after the other: its module list with the most bytes."""
    lists = [m for m in base_of(model).get_decoder().modules() if isinstance(m, nn.ModuleList)]
    return list(max(lists, key=lambda modules: sum(map(module_bytes, modules))))


def module_bytes(module: nn.Module) -> int:
    """Bytes of a module's parameters."""
    return sum(p.numel() * p.element_size() for p in module.parameters())
