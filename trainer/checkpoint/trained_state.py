"""What a rank holds of the state that training changes, under names that know no rank.

Whatever the layout (ZeRO 0, 2 or 3, offload, placed experts), a trained tensor is a whole logical one of which this
rank holds some runs of elements. They are given as live views: read them to save, write into them to restore.

Private to DeepSpeed (written against 0.19.8, which setup.cfg pins): where its optimizers keep their flat fp32 tensors.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from deepspeed.runtime.zero.partition_parameters import ZeroParamStatus
from torch import Tensor, nn

from trainer.distributed.engine import fp32_copies
from trainer.distributed.expert_shard import ExpertShard

PARAMETER = "parameter"  # the fp32 value the optimizer steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them
BLOCK = 256  # elements of a flat moment that bitsandbytes gives one scale


@dataclass(frozen=True)
class Key:
    """One whole logical tensor of the trained state; kind: PARAMETER or one of MOMENTS."""

    kind: str
    name: str  # of the parameter, without placement
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class Run:
    """Elements [start, start + live.numel()) of the flattened whole tensor; live: fp32 [n], the optimizer's own."""

    key: Key
    start: int
    live: Tensor


@dataclass(frozen=True)
class _EightBits:
    """A flat moment that bitsandbytes keeps in 8 bits, and its fp32 copy on the host, true between `read` and a step.

    state: the optimizer's of one flat tensor; index: 1 or 2, which of its moments.
    """

    state: dict[str, Any]
    index: int
    copy: Tensor

    def read(self) -> None:
        codes, absmax, code = (self.state[f"{name}{self.index}"] for name in ("state", "absmax", "qmap"))
        codes = codes.to(absmax.device)  # a paged optimizer's lie in memory that torch takes for the CPU's
        self.copy.copy_(functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK))

    def write(self) -> None:
        codes, absmax, code = (self.state[f"{name}{self.index}"] for name in ("state", "absmax", "qmap"))
        quantised, scales = functional.quantize_blockwise(self.copy.to(codes.device), code=code, blocksize=BLOCK)
        codes.copy_(quantised)
        absmax.copy_(scales.absmax)


class TrainedState:
    """All runs of one rank, by key. Made right after deepspeed.initialize, on every rank.

    Gives AdamW's moments their place at once (zeros, at step 0), where the optimizer would at its first step. Holds no
    copy of anything but of moments in 8 bits, whose runs are views of an fp32 copy: `read` before reading, `finish`
    after writing. Written back they may be one code off, since a block's scale is taken anew.
    """

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self._optimizer = engine.basic_optimizer
        self._eight_bits: list[_EightBits] = []
        self._seen: dict[int, dict[str, Tensor]] = {}  # moments by the id of their flat tensor
        self._copies = fp32_copies(engine.optimizer)
        self._parameters = {whole.name: whole for whole in _whole_parameters(model)}
        self.runs = {run.key: run for whole in self._parameters.values() for run in self._runs_of(whole)}

    @property
    def keys(self) -> list[Key]:
        """Of every whole tensor, the same on every rank and in the same order."""
        kinds = (PARAMETER, *MOMENTS)
        return [Key(kind, name, whole.shape) for kind in kinds for name, whole in sorted(self._parameters.items())]

    @torch.no_grad()
    def write(self, key: Key, values: Tensor) -> None:
        """Takes this rank's run out of a whole tensor (fp32, flat); of a parameter also what forward computes with."""
        if key in self.runs:
            run = self.runs[key]
            run.live.copy_(values[run.start : run.start + run.live.numel()])
        if key.kind == PARAMETER:
            self._parameters[key.name].write_computed(values)

    def read(self) -> None:
        """Makes every run show the state as it now is."""
        for moment in self._eight_bits:
            moment.read()

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """Makes what was written the state; step: the number of updates that AdamW corrects its moments' bias by."""
        for moment in self._eight_bits:
            moment.write()
        for state in self._optimizer.state.values():
            state["step"] = torch.full_like(state["step"], step) if torch.is_tensor(state["step"]) else step

    def _runs_of(self, whole: "_Whole") -> Iterator[Run]:
        found = _flat_of(whole.parameter, self._optimizer, self._copies)
        if found is None:
            return
        flat, offset, start, numel = found
        numel = min(numel, whole.own_numel - start)  # ZeRO-3 pads the last partitions
        values = {PARAMETER: flat, **self._moments(flat)}
        for kind, tensor in values.items():
            live = tensor.detach().view(-1)[offset : offset + max(numel, 0)]
            yield Run(Key(kind, whole.name, whole.shape), whole.own_start + start, live)

    def _moments(self, flat: Tensor) -> dict[str, Tensor]:
        if id(flat) not in self._seen:
            torch_own = isinstance(self._optimizer, torch.optim.AdamW)
            self._seen[id(flat)] = self._of_torch(flat) if torch_own else self._of_bitsandbytes(flat)
        return self._seen[id(flat)]

    def _of_torch(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[flat]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {kind: torch.zeros_like(flat, requires_grad=False) for kind in MOMENTS}
        return {kind: state[kind] for kind in MOMENTS}

    def _of_bitsandbytes(self, flat: Tensor) -> dict[str, Tensor]:
        state = self._optimizer.state[flat]
        if not state:
            (group,) = self._optimizer.param_groups
            kept, group["params"] = group["params"], [flat]  # it looks there for what it is asked about
            self._optimizer.init_state(group, flat, 0, 0)
            group["params"] = kept
        found = {}
        for index, kind in enumerate(MOMENTS, start=1):
            found[kind] = state[f"state{index}"]
            if found[kind].dtype == torch.uint8:  # small ones it keeps in fp32
                found[kind] = torch.zeros(flat.numel())
                self._eight_bits.append(_EightBits(state, index, found[kind]))
        return found


@dataclass(frozen=True)
class _Whole:
    """A trained parameter of this rank within the logical tensor it is of: `own` of a `ExpertShard`, or all of it.

    shape: of the logical tensor, of whose elements the parameter is [own_start, own_start + own_numel).
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    own_start: int
    own_numel: int

    def write_computed(self, values: Tensor) -> None:
        """Sets what forward computes with, in its dtype, from the whole tensor's fp32 values (flat)."""
        own = values[self.own_start : self.own_start + self.own_numel]
        parameter = self.parameter
        if not hasattr(parameter, "ds_tensor"):
            parameter.data.copy_(own.view(parameter.shape))
            return
        shard = parameter.ds_tensor
        start = _partition_rank(parameter) * shard.ds_numel
        mine = own[start : start + shard.ds_numel]
        shard.data.view(-1)[: mine.numel()].copy_(mine)
        if parameter.ds_status == ZeroParamStatus.AVAILABLE:  # small ones persist as wholes
            parameter.data.copy_(own.view(parameter.shape))


def _whole_parameters(model: nn.Module) -> Iterator[_Whole]:
    held = {f"{name}.own": (name, module) for name, module in model.named_modules() if isinstance(module, ExpertShard)}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name not in held:
            shape = tuple(getattr(parameter, "ds_shape", parameter.shape))
            yield _Whole(name, parameter, shape, 0, torch.Size(shape).numel())
            continue
        name, module = held[name]
        rank = module.groups.parallel.rank() if module.by_expert else 0
        yield _Whole(name, parameter, tuple(module.shape), rank * module.own_numel, module.own_numel)


def _flat_of(
    parameter: nn.Parameter, optimizer: torch.optim.Optimizer, copies: dict[nn.Parameter, Tensor]
) -> tuple[Tensor, int, int, int] | None:
    """(flat, offset, start, numel): the parameter's elements from `start` on stand in `flat` from `offset` on.

    None where this rank holds none of them. flat is a tensor that the optimizer steps, fp32.
    """
    if hasattr(parameter, "ds_tensor"):  # ZeRO-3
        zero = parameter._z3_optimizer
        group, offset, numel = zero.grad_position[zero.get_param_id(parameter)]
        return zero.fp32_partitioned_groups_flat[group], offset, _partition_rank(parameter) * numel, numel
    if hasattr(parameter, "_hp_mapping"):  # ZeRO-1 and 2
        mapping = parameter._hp_mapping
        if mapping is None:
            return None
        (flat,) = optimizer.param_groups[mapping.param_group_index]["params"]
        there, here = mapping.lp_fragment_address, mapping.hp_fragment_address
        return flat, here.start, there.start, here.numel
    return copies.get(parameter, parameter), 0, 0, parameter.numel()


def _partition_rank(parameter: nn.Parameter) -> int:
    """This rank's place among those over which ZeRO-3 cuts the parameter."""
    return parameter._z3_optimizer._get_param_partition_rank(parameter)
