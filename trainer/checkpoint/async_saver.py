"""Saves and restores the trained state of all ranks. Training waits only for a copy into host memory.

Rank 0 alone touches the disk, so ranks need not share a file system. The other ranks send what they hold from a thread
of their own, over a gloo group of its own, so no collective of the training waits for a save. Rank 0 puts whole tensors
together, one bucket of them at a time.
"""

import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from trainer.checkpoint.storage import CheckpointWriter, tensor_files
from trainer.checkpoint.trained_state import StateKey, TrainedState

BUCKET_BYTES = 128 * 2**20  # of whole tensors that rank 0 puts together at once
ELEMENT = 4  # bytes, fp32

Result = TypeVar("Result")


@dataclass(frozen=True)
class TensorSlice:
    """Consecutive elements of a whole tensor, and the rank that sends them."""

    rank: int
    key: StateKey
    start: int
    numel: int


@dataclass(frozen=True)
class TensorBucket:
    """Whole tensors that are sent together and written as one file."""

    keys: tuple[StateKey, ...]
    slices: tuple[TensorSlice, ...]  # in the order of ranks; they cover every element once

    def numel_of(self, rank: int) -> int:
        return sum(piece.numel for piece in self.slices if piece.rank == rank)


class AsyncSaver:
    """Made on every rank; every rank calls its methods in the same order.

    timeout: how long one rank's thread waits for another's.
    """

    def __init__(self, state: TrainedState, timeout: timedelta) -> None:
        self.state = state
        self._group = dist.new_group(backend="gloo", timeout=timeout)
        self._rank = dist.get_rank()
        self.buckets = make_buckets(state.keys, self._slices_of_all_ranks())
        self._on_gpu = torch.cuda.is_available()
        # written once, so that the first save does not wait for the system to find the memory
        self._copies = [torch.empty(b.numel_of(self._rank), pin_memory=self._on_gpu).zero_() for b in self.buckets]
        self._thread: threading.Thread | None = None
        self._problem: str | None = None

    def save(
        self, start: Callable[[], CheckpointWriter], finish: Callable[[CheckpointWriter], None], name: str
    ) -> None:
        """Copies the state and returns; the rest happens in a thread. Waits for an earlier save that is not done.

        Collective: every rank must call it. start and finish run on rank 0 only, in its thread: before the first file,
        and after all tensors are written. Their OSErrors are reported on stderr, and training goes on. name: of the
        save, for messages.
        """
        self._join()
        self._copy()
        self._problem = None
        work = self._receive if self._rank == 0 else self._send
        self._thread = threading.Thread(target=work, args=(start, finish, name), name="checkpoint", daemon=True)
        self._thread.start()

    def finish(self) -> str | None:
        """Waits for the last save; returns what kept it from the disk, or None, the same on every rank.

        Collective: every rank must call it.
        """
        self._join()
        problem = [self._problem]
        dist.broadcast_object_list(problem, src=0, group=self._group)
        return problem[0]

    def abandon(self, seconds: float) -> None:
        """Gives a save that is under way a little time; for runs that end with a fault."""
        if self._thread is not None:
            self._thread.join(seconds)

    @torch.no_grad()
    def restore(self, folder: Path, step: int) -> None:
        """Writes a checkpoint of that step into the state, one tensor at a time.

        Collective: every rank must call it. Only rank 0 reads the folder.
        """
        stored = _stored_tensors(folder) if self._rank == 0 else {}
        for key in self.state.keys:
            values = torch.empty(key.numel)
            if self._rank == 0:
                with safe_open(stored[str(key)][0], "pt") as file:
                    values = file.get_tensor(str(key)).flatten()
            dist.broadcast(values, src=0, group=self._group)
            self.state.write(key, values)
        self.state.finish(step)

    def check(self, folder: Path) -> str | None:
        """Why a checkpoint's tensors do not fit this state, or None. Call it on rank 0."""
        found = {name: shape for name, (_, shape) in _stored_tensors(folder).items()}
        wanted = {str(key): key.shape for key in self.state.keys}
        different = sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name))
        if not different:
            return None
        name = different[0]
        return f"{name} is {found.get(name, 'absent')} there and {wanted.get(name, 'absent')} here"

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    @torch.no_grad()
    def _copy(self) -> None:
        self.state.read()
        for bucket, copy in zip(self.buckets, self._copies, strict=True):
            offset = 0
            for piece in (piece for piece in bucket.slices if piece.rank == self._rank):
                live = self.state.slices[piece.key].live
                copy[offset : offset + piece.numel].copy_(live, non_blocking=True)
                offset += piece.numel
        if self._on_gpu:
            torch.cuda.synchronize()

    def _slices_of_all_ranks(self) -> list[list[TensorSlice]]:
        own = sorted(self.state.slices.values(), key=lambda each: str(each.key))
        mine = [TensorSlice(self._rank, each.key, each.start, each.live.numel()) for each in own if each.live.numel()]
        everyone: list[list[TensorSlice]] = [[] for _ in range(dist.get_world_size())]
        dist.all_gather_object(everyone, mine, group=self._group)
        return everyone

    def _send(self, _start: object, _finish: object, name: str) -> None:
        try:
            for copy in self._copies:
                if copy.numel():
                    dist.send(copy, dst=0, group=self._group)
        except RuntimeError as error:
            self._report(name, error)

    def _receive(
        self, start: Callable[[], CheckpointWriter], finish: Callable[[CheckpointWriter], None], name: str
    ) -> None:
        """Takes what the others send in any case: a full disk here must not keep them waiting."""
        writer = None
        try:
            writer = self._attempt(start, name)
            for index, bucket in enumerate(self.buckets):
                whole = self._put_together(bucket, self._copies[index])
                if writer is not None and self._problem is None:
                    file, content = f"state-{index + 1:05d}.safetensors", whole
                    self._attempt(lambda: writer.add(file, save(content)), name)  # noqa: B023 (called here)
            if writer is not None and self._problem is None:
                self._attempt(lambda: finish(writer), name)
        except RuntimeError as error:  # another rank is gone, which training will report
            self._report(name, error)
        if self._problem is not None and writer is not None:
            writer.discard()

    def _attempt(self, action: Callable[[], Result], name: str) -> Result | None:
        try:
            return action()
        except OSError as error:
            self._report(name, error)
            return None

    def _put_together(self, bucket: TensorBucket, own: Tensor) -> dict[str, Tensor]:
        """The bucket's whole tensors by the text of their keys, from every rank's slices."""
        whole = {key: torch.empty(key.numel) for key in bucket.keys}
        for rank in range(dist.get_world_size()):
            values = own
            if rank != self._rank:
                values = torch.empty(bucket.numel_of(rank))
                if values.numel():
                    dist.recv(values, src=rank, group=self._group)
            offset = 0
            for piece in (piece for piece in bucket.slices if piece.rank == rank):
                whole[piece.key][piece.start : piece.start + piece.numel] = values[offset : offset + piece.numel]
                offset += piece.numel
        return {str(key): values.view(key.shape) for key, values in whole.items()}

    def _report(self, name: str, error: Exception) -> None:
        self._problem = " ".join(str(error).split())[:300]
        print(f"warning: {name} was not saved: {self._problem}; training goes on", file=sys.stderr, flush=True)


def make_buckets(keys: list[StateKey], slices_by_rank: list[list[TensorSlice]]) -> list[TensorBucket]:
    """Keys in their order, cut into buckets. Of equal slices (where every rank holds the whole) the first is sent.

    Raises RuntimeError where the ranks together do not hold a whole tensor.
    """
    by_key: dict[StateKey, list[TensorSlice]] = {key: [] for key in keys}
    taken = set()
    for slices in slices_by_rank:
        for piece in slices:
            if (piece.key, piece.start) not in taken:
                taken.add((piece.key, piece.start))
                by_key[piece.key].append(piece)
    buckets: list[list[StateKey]] = []
    room = 0
    for key in keys:
        size = key.numel * ELEMENT
        if size > room:
            buckets.append([])
            room = BUCKET_BYTES
        buckets[-1].append(key)
        room -= size
    return [_bucket(group, by_key) for group in buckets]


def _bucket(keys: list[StateKey], by_key: dict[StateKey, list[TensorSlice]]) -> TensorBucket:
    for key in keys:
        if sum(piece.numel for piece in by_key[key]) != key.numel:
            raise RuntimeError(f"{key}: the ranks hold {sum(p.numel for p in by_key[key])} of {key.numel} elements")
    slices = [piece for key in keys for piece in by_key[key]]
    return TensorBucket(tuple(keys), tuple(sorted(slices, key=lambda piece: piece.rank)))


def _stored_tensors(folder: Path) -> dict[str, tuple[Path, tuple[int, ...]]]:
    """File and shape of every tensor in a checkpoint, by the text of its key."""
    found: dict[str, tuple[Path, tuple[int, ...]]] = {}
    for path in tensor_files(folder):
        with safe_open(path, "pt") as file:
            found |= {name: (path, tuple(file.get_slice(name).get_shape())) for name in file.keys()}  # noqa: SIM118
    return found
