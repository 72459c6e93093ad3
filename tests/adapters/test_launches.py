"""How many kernels a GPU is asked for in one adapted linear: operations that are not mere views, in bf16."""

from collections import Counter

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from tests.support.tiny_adapters import config_of, make_experts

# Operations that compute nothing on the device.
FREE = {"view", "t", "slice", "unsqueeze", "split_with_sizes", "empty_like", "new_empty", "promote_types"}


class Launches(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if name not in FREE:
            self.names[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize(
    ("method", "options", "forward", "backward"),
    [
        ("teamlora", {}, 14, 24),
        ("moelora", {}, 14, 24),
        ("hydralora", {}, 14, 24),
        ("teamlora", {"renormalize": True}, 15, 34),
    ],
)
def test_a_layer_launches_few_kernels(method, options, forward, backward):
    experts = make_experts(config_of(method, **options), dtype=torch.bfloat16)
    x, y = (torch.randn(9, size, dtype=torch.bfloat16, requires_grad=True) for size in (20, 28))
    with Launches() as launched:
        out = experts(x, y)
    assert 5 < launched.names.total() <= forward, launched.names
    gradient = torch.randn_like(out)
    with Launches() as launched:
        torch.autograd.grad(out, [x, y, *experts.parameters()], gradient)
    assert 5 < launched.names.total() <= backward, launched.names
