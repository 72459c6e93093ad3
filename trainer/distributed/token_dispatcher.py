"""The experts' product where tokens travel to the experts' owners, and outputs back."""

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class TokenDispatcher:
    """One forward's exchange in an expert-parallel group of n ranks.

    counts: tokens of each rank, in the order of ranks; they may differ. Collective: every rank of the group calls
    `add` and `backward` for the same layers in the same order.
    """

    group: dist.ProcessGroup
    counts: tuple[int, ...]

    def add(self, y: Tensor, gated: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """y [..., d_out] plus all experts' output, and what this rank's experts received, for `backward`.

        gated: z under its gate [k r_B, tokens]; own: this rank's experts [k / n, r_B, d_out].
        Sends (n - 1) / n of gated, and d_out elements for each token of the other ranks.
        """
        received = self._to_owners(gated)
        shares = self._send((received.t() @ own.flatten(0, 1)).split(self.counts), own.shape[-1])
        return (y + shares.sum(0, dtype=_at_least_fp32(shares)).view(y.shape)).to(y.dtype), received

    def backward(self, grad: Tensor, received: Tensor, own: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients of `gated` [k r_B, tokens] and of `own`, from that of the output [tokens, d_out]."""
        n, width = len(self.counts), own.shape[0] * own.shape[1]
        everyone = grad.new_empty(sum(self.counts), grad.shape[1])
        outgoing = grad.expand(n, *grad.shape).reshape(-1)
        sizes = [count * grad.shape[1] for count in self.counts]
        dist.all_to_all_single(everyone.view(-1), outgoing, sizes, [grad.numel()] * n, group=self.group)
        grad_own = (received @ everyone).view(own.shape)
        grad_gated = self._send((everyone @ own.flatten(0, 1).t()).split(self.counts), width)
        return grad_gated.transpose(1, 2).reshape(n * width, -1), grad_own

    def _to_owners(self, gated: Tensor) -> Tensor:
        """Sends each owner its rows of gated [k r_B, tokens]; returns [k r_B / n, tokens of all ranks]."""
        n, width = len(self.counts), gated.shape[0] // len(self.counts)
        sizes = [width * count for count in self.counts]
        flat = gated.new_empty(sum(sizes))
        dist.all_to_all_single(flat, gated.reshape(-1), sizes, [width * gated.shape[1]] * n, group=self.group)
        return torch.cat([part.view(width, -1) for part in flat.split(sizes)], dim=1)

    def _send(self, parts: tuple[Tensor, ...], width: int) -> Tensor:
        """Sends parts[j] [tokens of rank j, width] to rank j; returns [n, own tokens, width] by sender."""
        n, mine = len(self.counts), self.counts[self.group.rank()]
        outgoing = torch.cat(parts).view(-1)
        incoming = outgoing.new_empty(n * mine * width)
        sizes = [count * width for count in self.counts]
        dist.all_to_all_single(incoming, outgoing, [mine * width] * n, sizes, group=self.group)
        return incoming.view(n, mine, width)


def _at_least_fp32(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
