"""The adapted model as a rank will hold it, built by the code that trains, with every parameter on meta."""

from dataclasses import dataclass

import torch
from peft import PeftModel
from torch import nn
from transformers import PretrainedConfig

from trainer.adapters.attach import attach_on_meta, check_adapter
from trainer.base.loader import pack_linears, tie
from trainer.base.weight_map import DTYPES, skeleton
from trainer.distributed.expert_parallel import ExpertParallel
from trainer.distributed.expert_shard import ExpertGroups
from trainer.recipe import BaseModelConfig, ExpertsConfig, Recipe


@dataclass(frozen=True)
class RankModel:
    """model: adapted, its parameters on meta; tied weights are one parameter. placement: None without one.

    by_expert: parameters that ZeRO-3 partitions over the replicas of a rank and not over all ranks.
    """

    model: PeftModel
    config: PretrainedConfig
    dtype: torch.dtype
    placement: ExpertParallel | None

    @property
    def by_expert(self) -> set[nn.Parameter]:
        return set(self.placement.by_expert) if self.placement is not None else set()


@dataclass(frozen=True)
class _Stand:
    """Stands for a process group where only its size and this rank's place are asked for."""

    members: int

    def size(self) -> int:
        return self.members

    def rank(self) -> int:
        return 0


def build_rank_model(config: PretrainedConfig, recipe: Recipe, world_size: int) -> RankModel:
    """What each of `world_size` ranks builds; all ranks hold equally much. Raises UserError as a run would."""
    model = build_base(config, recipe.base)
    check_adapter(model, recipe.adapter)
    adapted = attach_on_meta(model, recipe.adapter, DTYPES[recipe.base.dtype])
    placement = None
    if recipe.experts.parallel_size > 1:
        placement = ExpertParallel(adapted, groups_without_ranks(recipe.experts, world_size), recipe.experts.dispatch)
    return RankModel(adapted, config, DTYPES[recipe.base.dtype], placement)


def build_base(config: PretrainedConfig, base: BaseModelConfig) -> nn.Module:
    """The frozen base; with sdpa for flash_attention_2, which needs a GPU to be built with and has the same weights."""
    attention = "sdpa" if base.attention == "flash_attention_2" else base.attention
    model = skeleton(config, base.model_copy(update={"attention": attention}))
    if base.quantization == "nf4":
        pack_linears(model, DTYPES[base.dtype])
    tie(model)
    model.config.use_cache = False
    return model.requires_grad_(False)


def groups_without_ranks(experts: ExpertsConfig, world_size: int) -> ExpertGroups:
    """Groups of a placement's sizes, with nobody in them."""
    size = experts.parallel_size
    return ExpertGroups(_Stand(size), _Stand(world_size // size), experts.replicate)
