"""DeepSpeed's offload of activations on a CPU: it copies there as if the device had memory of its own."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

from deepspeed.runtime.activation_checkpointing import offload_activations


class _Apart:
    """DeepSpeed's CPU, but one that the host does not share: what is offloaded must be copied."""

    def __init__(self, accelerator: Any) -> None:
        self._accelerator = accelerator

    def is_synchronized_device(self) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(self._accelerator, name)


@contextmanager
def copied_on_cpu() -> Iterator[None]:
    """Within, DeepSpeed copies to buffers and back; elsewhere in DeepSpeed the CPU stays what it is."""
    accelerator = _Apart(offload_activations.get_accelerator())
    with mock.patch.object(offload_activations, "get_accelerator", lambda: accelerator):
        yield
