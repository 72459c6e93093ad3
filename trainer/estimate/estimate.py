"""Estimates a run's memory and traffic per rank, before anything is launched."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from trainer.base.model_config import parse_config_alone
from trainer.distributed.deepspeed_config import check_sharded_base, read_deepspeed_config
from trainer.distributed.expert_parallel import gathers_by_layer
from trainer.distributed.rank_groups import shard_groups
from trainer.estimate.activations import Activations, estimate_activations
from trainer.estimate.rank_model import RankModel, build_rank_model, groups_without_ranks
from trainer.estimate.resident import DeviceKind, MemoryUse, estimate_resident
from trainer.estimate.step_time import Hardware, StepTime, step_flops, step_time
from trainer.estimate.traffic import Flow, bytes_between_nodes, flows, sent_bytes
from trainer.estimate.transient import Transient, estimate_loading, estimate_transient
from trainer.estimate.zero_settings import ZeroSettings, zero_settings
from trainer.objective.batches import GPU_MULTIPLE, padded_length, plan_batches
from trainer.recipe import Recipe


@dataclass(frozen=True)
class Estimate:
    """Bytes per rank. All ranks hold equally much, except that rank 0's checkpoint copy is the largest.

    trained: elements of the adapter. resident: held from the first step to the last. transient: on the device at the
    peak of a step. loading: the peak before the first step. flows: of bytes, in a step. flops: operations of one rank
    in a step. tokens: of all ranks in a step.
    """

    recipe: Recipe
    world_size: int
    trained: int
    zero: ZeroSettings
    resident: tuple[MemoryUse, ...]
    transient: Transient
    loading: MemoryUse
    flows: tuple[Flow, ...]
    flops: float
    tokens: int
    ranks_per_node: int

    @property
    def sent(self) -> dict[str, int]:
        """{purpose: bytes} that each rank sends in a step."""
        return sent_bytes(self.flows)

    @property
    def between_nodes(self) -> dict[str, int]:
        """{purpose: bytes} that leave each node in a step."""
        return bytes_between_nodes(self.flows, self.ranks_per_node)

    def step_time(self, hardware: Hardware) -> StepTime:
        return step_time(self.flops, self.flows, self.ranks_per_node, hardware)

    @property
    def rows(self) -> list[MemoryUse]:
        """Every category of training that is not empty."""
        transient = (MemoryUse(name, device=size) for name, size in self.transient.by_name.items())
        return [row for row in (*self.resident, *transient) if row.device or row.host]

    @cached_property
    def device(self) -> int:
        return max(self.loading.device, sum(row.device for row in self.rows))

    @cached_property
    def host(self) -> int:
        return max(self.loading.host, sum(row.host for row in self.rows))

    def fits(self, device: int | None, host: int | None) -> bool:
        """Whether each rank fits into so many bytes; None is no limit."""
        return (device is None or self.device <= device) and (host is None or self.host <= host)


class Estimator:
    """Estimates recipes of one base; recipes share the work that they have in common.

    kind: of device that training will run on; None: a GPU if this machine has one, else the CPU. ranks_per_node: None:
    all ranks are on one node.
    """

    def __init__(self, recipe: Recipe, kind: DeviceKind | None = None, ranks_per_node: int | None = None) -> None:
        self.kind: DeviceKind = kind or ("cuda" if torch.cuda.is_available() else "cpu")
        self.ranks_per_node = ranks_per_node
        self._config: PretrainedConfig = parse_config_alone(recipe.base)
        self._models: dict[tuple, RankModel] = {}
        self._activations: dict[tuple, Activations] = {}

    def estimate(self, recipe: Recipe, world_size: int, kind: DeviceKind | None = None) -> Estimate:
        """Estimates one recipe. kind: of device; None: the estimator's own.

        Raises UserError if a run of this recipe on so many ranks would be refused.
        """
        plan = plan_batches(recipe.train.global_batch_size, recipe.train.micro_batch_size, world_size)
        config = read_deepspeed_config(recipe, plan)
        check_sharded_base(config, recipe.deepspeed.config)
        per_node = self.ranks_per_node or world_size
        local_ranks = [rank % per_node for rank in range(world_size)]
        groups = shard_groups(recipe, local_ranks, config)
        zero = zero_settings(config, groups.base)
        model = self._model(recipe, zero.stage, world_size, groups.adapter)
        kind = kind or self.kind
        padded = _with_padded_rows(recipe, kind)
        activations = self._activations_of(padded)
        offloaded = activations.offloaded(recipe.train.activation_checkpointing)
        resident = (
            *estimate_resident(model, zero, recipe.train.optimizer, world_size, kind),
            MemoryUse("offloaded activations", host=offloaded),
        )
        return Estimate(
            recipe=recipe,
            world_size=world_size,
            trained=model.trained_elements,
            zero=zero,
            resident=resident,
            transient=estimate_transient(model, activations, zero, padded, plan),
            loading=estimate_loading(resident, model, recipe.experts),
            flows=tuple(flows(model, zero, world_size, plan.gradient_accumulation_steps)),
            flops=step_flops(model, recipe, plan),
            tokens=recipe.train.global_batch_size * recipe.data.seq_len,
            ranks_per_node=per_node,
        )

    def _model(self, recipe: Recipe, stage: int, world_size: int, adapter_group: int) -> RankModel:
        groups = groups_without_ranks(recipe.experts, world_size, adapter_group)
        by_layer = gathers_by_layer(recipe, stage, groups)
        key: tuple = (by_layer,)
        if recipe.experts.parallel_size > 1:  # else the model is the same on any number of ranks
            key = (recipe.experts.parallel_size, recipe.experts.replicate, world_size, adapter_group)
        if key not in self._models:
            self._models[key] = build_rank_model(self._config, recipe, groups, by_layer)
        return replace(self._models[key], groups=groups)

    def _activations_of(self, recipe: Recipe) -> Activations:
        key = (recipe.train.micro_batch_size, recipe.data.seq_len)
        if key not in self._activations:
            self._activations[key] = estimate_activations(self._config, recipe)
        return self._activations[key]


def _with_padded_rows(recipe: Recipe, kind: DeviceKind) -> Recipe:
    """The recipe with rows of the length that training pads them to."""
    length = padded_length(recipe.data.seq_len, GPU_MULTIPLE if kind == "cuda" else 1)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"seq_len": length})})
