"""Logits at chosen positions, of which only a chunk exists at a time, and the cross-entropy computed from them.

With a vocabulary of 128k, the logits of a micro-batch are the largest tensors of a step by far. The output embedding is
frozen, so a chunk's gradient for its hidden states is computed in forward, right after the chunk's losses, and kept in
place of logits: [tokens, hidden] instead of [tokens, vocabulary].
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F
from transformers import PreTrainedModel

from trainer.objective.logits_tail import find_logits_tail

CHUNK_BYTES = 64 * 2**20  # of a chunk's logits in fp32

Forward = Callable[[], Any]  # one forward of the model
Project = Callable[[Tensor], Tensor]  # the head's own forward: [tokens, d] -> [tokens, vocabulary]
ByLogits = Callable[[Tensor, slice], Tensor]  # (logits [tokens, vocabulary], which tokens) -> [tokens, ...]


def default_chunk(vocabulary: int) -> int:
    """Tokens whose logits take up to CHUNK_BYTES in fp32; at least one."""
    return max(1, CHUNK_BYTES // (4 * vocabulary))


class ChunkedLogits:
    """Runs a causal LM's output embedding on chosen positions, `chunk` of them at a time.

    chunk: tokens; 0: all; None: default_chunk. All, too, where the model's class allows no chunks
    (`find_logits_tail`). All chunks are computed within one forward of the output embedding, so under ZeRO-3 its
    weight is gathered once, whatever the number of positions of each rank; in backward only where chunk is 0.
    """

    def __init__(self, model: nn.Module, chunk: int | None = None) -> None:
        causal_lm = cast(PreTrainedModel, model)  # PEFT's model passes on what it is asked
        self._head = causal_lm.get_output_embeddings()
        self._tail = find_logits_tail(model)
        if chunk is None:
            chunk = default_chunk(causal_lm.config.get_text_config().vocab_size)
        self.chunk = chunk if self._tail is not None else 0

    def map(self, forward: Forward, positions: Tensor, function: ByLogits) -> Tensor:
        """The function's values for each position [positions, ...]. Differentiable only where all are computed at once.

        positions: int64 on the model's device, counted over all rows. function: is given each chunk's logits.
        """
        if self._whole():
            with head_sees(self._head, positions):
                return function(forward().logits, slice(0, len(positions)))

        def compute(hidden: Tensor, project: Project) -> Tensor:
            chunks = _chunks(hidden, self.chunk)
            return torch.cat([function(self._logits(hidden[each], project), each) for each in chunks])

        return self._within_head(forward, positions, compute)

    def split(self, forward: Forward, positions: Tensor, size: int) -> Iterator[Tensor]:
        """The logits at all positions, `size` of them after the other. Only for a head that ZeRO-3 does not shard."""
        if self._tail is None:
            yield from self.map(forward, positions, lambda logits, _: logits).split(size)
            return
        hidden = self._within_head(forward, positions, lambda hidden, _: hidden)
        for each in _chunks(hidden, size):
            yield self._logits(hidden[each], self._head.forward)

    def cross_entropy(self, forward: Forward, positions: Tensor, targets: Tensor) -> Tensor:
        """The loss at each position, in nats: fp32 [positions]. Differentiable.

        targets: int64 [positions], the tokens to predict.
        """
        if self._whole() or not torch.is_grad_enabled():
            return self.map(forward, positions, lambda logits, where: token_losses(logits, targets[where]))
        kept: list[Tensor] = []

        def compute(hidden: Tensor, project: Project) -> Tensor:
            chunks = _chunks(hidden, self.chunk)
            parts = [self._loss_and_gradient(hidden[each], targets[each], project) for each in chunks]
            losses, gradients = (torch.cat(part) for part in zip(*parts, strict=True))
            kept.extend((hidden, gradients))
            return losses

        losses = self._within_head(forward, positions, compute)
        # Attached outside the head: ZeRO-3 would gather the head's weight again in the backward of its output.
        return _KnownGradient.apply(losses, *kept)

    def _whole(self) -> bool:
        """Whether all logits are computed at once, by the model's own forward; always for a head that learns."""
        learns = torch.is_grad_enabled() and any(p.requires_grad for p in self._head.parameters())
        return learns or not self.chunk

    def _within_head(self, forward: Forward, positions: Tensor, compute: Callable[[Tensor, Project], Tensor]) -> Tensor:
        """compute(hidden [positions, d], the head's own forward), called where the head would compute logits."""
        found: list[Tensor] = []
        project = self._head.forward

        def stand_in(hidden: Tensor) -> Tensor:
            with torch.no_grad():
                found.append(compute(hidden, project))
            # Not finite where a value is not: the search for the first such layer must find the head.
            return found[0].sum().view(1, 1, 1)

        with head_sees(self._head, positions), _computes(self._head, stand_in):
            forward()
        return found[0]

    def _logits(self, hidden: Tensor, project: Project) -> Tensor:
        assert self._tail is not None  # chunk is 0 without it
        return self._tail(project(hidden))

    def _loss_and_gradient(self, hidden: Tensor, targets: Tensor, project: Project) -> tuple[Tensor, Tensor]:
        """Losses fp32 [tokens], and the gradient of each for its own hidden states [tokens, d], in their dtype."""
        hidden = hidden.detach().requires_grad_()
        with torch.enable_grad():
            logits = self._logits(hidden, project)
        log_p = F.log_softmax(logits.detach(), -1, dtype=torch.float32)
        losses = F.nll_loss(log_p, targets, reduction="none")
        grad_logits = log_p.exp_()  # in place: the softmax, then minus one at the target
        grad_logits[torch.arange(len(targets), device=targets.device), targets] -= 1
        (gradient,) = torch.autograd.grad(logits, hidden, grad_logits.to(logits.dtype))
        return losses, gradient


def _chunks(hidden: Tensor, size: int) -> Iterator[slice]:
    """At least one, which may be empty."""
    for start in range(0, max(len(hidden), 1), size):
        yield slice(start, start + size)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """The cross-entropy of each token, in nats: fp32 [tokens]."""
    return F.cross_entropy(logits.float(), targets, reduction="none")


@contextmanager
def head_sees(head: nn.Module, positions: Tensor) -> Iterator[None]:
    """Within, the head gets hidden [positions, d] in place of [batch, seq, d].

    positions: int64, counted over all rows. A mask would make the host wait for the GPU.
    """
    hook = head.register_forward_pre_hook(lambda _head, args: (args[0].flatten(0, 1)[positions],))
    try:
        yield
    finally:
        hook.remove()


@contextmanager
def _computes(head: nn.Module, forward: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Within, the head's forward is another; its hooks, by which ZeRO-3 gathers the weight, run as ever."""
    own = vars(head)
    before = own.get("forward")
    own["forward"] = forward
    try:
        yield
    finally:
        own.pop("forward") if before is None else own.update(forward=before)


class _KnownGradient(torch.autograd.Function):
    """losses [tokens] as a function of hidden [tokens, d]; each one's gradient is known beforehand."""

    @staticmethod
    def forward(ctx: Any, losses: Tensor, hidden: Tensor, gradient: Tensor) -> Tensor:
        ctx.save_for_backward(gradient)
        return losses.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor, None]:
        (gradient,) = ctx.saved_tensors
        return None, (gradient * grad[:, None]).to(gradient.dtype), None  # multiplied in fp32, which grad is
