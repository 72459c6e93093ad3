"""What a rank holds of the state that training changes, under names that do not depend on ranks.

Whatever the layout (ZeRO 0, 2 or 3, offload, placed experts), a trained tensor is one whole logical tensor of which
this rank holds some elements. They are live views: read them to save, write into them to restore.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from bitsandbytes import functional
from torch import Tensor, nn

from trainer.distributed.deepspeed_internals import (
    find_optimizer_slice,
    fp32_copies,
    whole_shape,
    write_computed_values,
)
from trainer.distributed.expert_shard import expert_shards
from trainer.objective.optimizer import set_steps

PARAMETER = "parameter"  # the fp32 value the optimizer steps
MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's, as torch names them
BLOCK = 256  # elements of a flat moment that bitsandbytes gives one scale


@dataclass(frozen=True)
class StateKey:
    """Names one whole logical tensor of the trained state. kind: PARAMETER or one of MOMENTS."""

    kind: str
    name: str  # of the parameter, without placement
    shape: tuple[int, ...]

    @property
    def numel(self) -> int:
        return torch.Size(self.shape).numel()

    def __str__(self) -> str:
        return f"{self.kind}/{self.name}"


@dataclass(frozen=True)
class StateSlice:
    """Elements [start, start + live.numel()) of the flattened whole tensor; live: fp32 [n], the optimizer's own."""

    key: StateKey
    start: int
    live: Tensor


@dataclass(frozen=True)
class _QuantizedMoment:
    """A flat moment that bitsandbytes keeps in 8 bits, and its fp32 copy on the host, valid from `read` to a step.

    state: the optimizer's state of one flat tensor. index: 1 or 2, which of its moments.
    """

    state: dict[str, Any]
    index: int
    copy: Tensor

    def read(self) -> None:
        codes, absmax, code = (self.state[f"{name}{self.index}"] for name in ("state", "absmax", "qmap"))
        codes = codes.to(absmax.device)  # torch takes a paged optimizer's memory for the CPU's
        self.copy.copy_(functional.dequantize_blockwise(codes, absmax=absmax, code=code, blocksize=BLOCK))

    def write(self) -> None:
        codes, absmax, code = (self.state[f"{name}{self.index}"] for name in ("state", "absmax", "qmap"))
        quantised, scales = functional.quantize_blockwise(self.copy.to(codes.device), code=code, blocksize=BLOCK)
        codes.copy_(quantised)
        absmax.copy_(scales.absmax)


class TrainedState:
    """The slices of the trained state that this rank holds. Made on every rank, right after deepspeed.initialize.

    Allocates AdamW's moments at once (zeros, at step 0), where the optimizer would at its first step. Copies nothing
    except moments in 8 bits, whose slices are views of an fp32 copy: call `read` before reading, `finish` after
    writing. Written back, those may be one code off, since each block's scale is computed again.
    """

    def __init__(self, engine: Any, model: nn.Module) -> None:
        self._optimizer = engine.basic_optimizer
        self._quantized: list[_QuantizedMoment] = []
        self._seen: dict[int, dict[str, Tensor]] = {}  # moments by the id of their flat tensor
        self._copies = fp32_copies(engine.optimizer)
        self._parameters = {whole.name: whole for whole in _trained_parameters(model)}
        self.slices = {each.key: each for whole in self._parameters.values() for each in self._slices_of(whole)}

    @property
    def keys(self) -> list[StateKey]:
        """Of every whole tensor, the same on every rank and in the same order."""
        kinds = (PARAMETER, *MOMENTS)
        return [StateKey(kind, name, whole.shape) for kind in kinds for name, whole in sorted(self._parameters.items())]

    @torch.no_grad()
    def write(self, key: StateKey, values: Tensor) -> None:
        """Writes this rank's elements of a whole tensor (fp32, flat); of a parameter also the forward's values."""
        if key in self.slices:
            mine = self.slices[key]
            mine.live.copy_(values[mine.start : mine.start + mine.live.numel()])
        if key.kind == PARAMETER:
            self._parameters[key.name].write_computed(values)

    def read(self) -> None:
        """Makes every slice show the current state."""
        for moment in self._quantized:
            moment.read()

    @torch.no_grad()
    def finish(self, step: int) -> None:
        """Makes what was written the state; step: the number of updates that AdamW corrects its moments' bias by."""
        for moment in self._quantized:
            moment.write()
        set_steps(self._optimizer, step)

    def _slices_of(self, whole: "_TrainedParameter") -> Iterator[StateSlice]:
        found = find_optimizer_slice(whole.parameter, self._optimizer, self._copies)
        if found is None:
            return
        numel = max(min(found.numel, whole.own_numel - found.start), 0)  # ZeRO-3 pads the last partitions
        values = {PARAMETER: found.flat, **self._moments(found.flat)}
        for kind, tensor in values.items():
            live = tensor.detach().view(-1)[found.offset : found.offset + numel]
            yield StateSlice(StateKey(kind, whole.name, whole.shape), whole.own_start + found.start, live)

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
                self._quantized.append(_QuantizedMoment(state, index, found[kind]))
        return found


@dataclass(frozen=True)
class _TrainedParameter:
    """A trained parameter of this rank, and its place in the logical tensor.

    The parameter is the elements [own_start, own_start + own_numel) of a logical tensor of `shape`: the `own` part of
    an ExpertShard, or all of it.
    """

    name: str
    parameter: nn.Parameter
    shape: tuple[int, ...]
    own_start: int
    own_numel: int

    def write_computed(self, values: Tensor) -> None:
        """Sets what forward computes with, from the whole logical tensor's fp32 values (flat)."""
        write_computed_values(self.parameter, values[self.own_start : self.own_start + self.own_numel])


def _trained_parameters(model: nn.Module) -> Iterator[_TrainedParameter]:
    placed = expert_shards(model)
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        if name in placed:
            name, shard = placed[name]
            yield _TrainedParameter(name, parameter, tuple(shard.shape), shard.own_start, shard.own_numel)
        else:
            shape = whole_shape(parameter)
            yield _TrainedParameter(name, parameter, tuple(shape), 0, shape.numel())
