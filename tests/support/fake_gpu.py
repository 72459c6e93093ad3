"""A GPU that computes nothing: tensors with shapes, dtypes and a device, on which mixing devices is an error.

It is a backend of torch made in Python, so it stays registered until the process ends: use it in a process of its own.
FakeTensorMode with device "cuda" would be simpler, but aborts a CPU build of torch as soon as a gradient is wanted.
Written against torch 2.13. Branches on device.type == "cuda" are not taken, and there are no streams.
"""

import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any
from unittest import mock

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.experimental.symbolic_shapes import ShapeEnv
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.backend_registration import _setup_privateuseone_for_python_backend
from transformers import masking_utils

from trainer.base.nf4 import BLOCKS_OF_BLOCKS, NF4Linear, SecondLevel

NAME = "fakegpu"
# Operations whose result, or its shape, the host needs before it can go on.
VALUES = {"aten::_local_scalar_dense", "aten::equal", "aten::is_nonzero"}
SHAPES = {"aten::nonzero", "aten::masked_select", "aten::_unique2", "aten::unique_consecutive", "aten::bincount"}
# The same in Python, where a fake tensor has no values to give.
METHODS = {Tensor.item, Tensor.tolist, Tensor.__bool__, Tensor.__int__, Tensor.__float__, Tensor.__index__}


def register() -> torch.device:
    """Registers the device in this process and returns it."""
    module = SimpleNamespace(
        current_device=lambda: 0,
        device_count=lambda: 1,
        get_amp_supported_dtype=lambda: [torch.bfloat16, torch.float16],
        is_available=lambda: True,
        is_initialized=lambda: True,
        _is_in_bad_fork=lambda: False,
        manual_seed_all=lambda _seed: None,
    )
    _setup_privateuseone_for_python_backend(NAME, backend_module=module)
    return torch.device(NAME, 0)


def fake_tensors() -> FakeTensorMode:
    """Within, new tensors are fake, and an operation on tensors of two devices raises."""
    return FakeTensorMode(shape_env=ShapeEnv(), allow_non_fake_inputs=True, static_shapes=True)


def move_to(device: torch.device, model: nn.Module) -> None:
    """Puts a model that is on meta on the fake device; call it under `fake_tensors`, but make the model before."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None:
                module._parameters[name] = nn.Parameter(torch.empty_like(p, device=device), p.requires_grad)
        for name, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[name] = torch.empty_like(buffer, device=device)
        if isinstance(module, NF4Linear):
            module.second = _second_level(module, device)


class HostSyncs:
    """Counts where the host waits for the device, by the line of the project that makes it wait."""

    def __init__(self) -> None:
        self.places: Counter[str] = Counter()

    def __len__(self) -> int:
        return sum(self.places.values())

    @contextmanager
    def counted(self) -> Iterator[None]:
        """Within, waiting is counted; call it under `fake_tensors`. Values that are asked for are ones.

        transformers does not wait for fake tensors, as it does for real ones: here it takes them for real.
        """
        real = mock.patch.object(masking_utils, "is_tracing", lambda _tensor: False)
        # FakeTensor's own goes element by element
        whole = mock.patch.object(FakeTensor, "tolist", Tensor.tolist)
        with real, whole, _Functions(self), _Operations(self):
            yield

    @contextmanager
    def none_may_be_added(self) -> Iterator[None]:
        """Raises at its end where the host has waited within."""
        before = self.places.copy()
        yield
        assert self.places == before, dict(self.places - before)

    def add(self, what: str) -> None:
        frames = [frame for frame in traceback.extract_stack() if "/trainer/" in frame.filename]
        place = f"{frames[-1].filename.rpartition('/')[2]}:{frames[-1].lineno}" if frames else "a library"
        self.places[f"{place} {what}"] += 1


class _Functions(TorchFunctionMode):
    """Methods of a tensor that give Python values."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_function__(self, func: Callable, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func not in METHODS or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        if args[0].device.type == NAME:
            self.syncs.add(func.__name__)
        ones = _ones(args[0] if func is Tensor.tolist else args[0].reshape(()))
        return {Tensor.__bool__: bool, Tensor.__int__: int, Tensor.__float__: float}.get(func, lambda x: x)(ones)


class _Operations(TorchDispatchMode):
    """What the library's own code does."""

    def __init__(self, syncs: HostSyncs) -> None:
        super().__init__()
        self.syncs = syncs

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, tensors = func._schema.name, [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        on_device = any(tensor.device.type == NAME for tensor in tensors)
        masked = name in ("aten::index", "aten::index_put_", "aten::_index_put_impl_", "aten::index_put") and any(
            t is not None and t.dtype in (torch.bool, torch.uint8) for t in args[1]
        )
        if on_device and (name in VALUES | SHAPES or masked):
            self.syncs.add(name)
        if name == "aten::_local_scalar_dense":
            return _ones(args[0])
        result = func(*args, **(kwargs or {}))
        leaves = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        if on_device and name in ("aten::_to_copy", "aten::copy_") and any(t.device.type == "cpu" for t in leaves):
            self.syncs.add(name)
        return result


def _ones(tensor: Tensor) -> Any:
    """What `tolist` would give for a tensor of ones."""
    return np.ones(tuple(tensor.shape), float if tensor.is_floating_point() else int).tolist()


def _second_level(module: NF4Linear, device: torch.device) -> SecondLevel:
    blocks = -(-module.absmax.numel() // BLOCKS_OF_BLOCKS)
    return SecondLevel(*(torch.empty(shape, device=device) for shape in ((blocks,), (256,), ())))
