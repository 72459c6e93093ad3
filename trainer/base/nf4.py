"""A frozen linear layer whose weight is held in 4-bit NormalFloat (NF4), as plain uint8 parameters.

NF4 with double quantisation is QLoRA's (Dettmers et al. 2023, section 3): each block of 64 weights keeps 4-bit
indices and its absolute maximum; each block of 256 of those maxima, less their mean, keeps 8-bit indices and one fp32
maximum. Packed weights and first-level maxima are ordinary parameters here, so ZeRO-3 partitions, gathers and offloads
both like any frozen parameter.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import cast

import bitsandbytes.functional as bnb
import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional as F

BLOCK = 64
BLOCKS_OF_BLOCKS = 256
FEW_ROWS = 64
"""Up to so many rows without a gradient, a GPU multiplies by the packed weight and never writes it out."""


@dataclass(frozen=True)
class SecondLevel:
    """Turns uint8 maxima back into fp32: absmax [ceil(blocks / 256)], code [256], offset [] (all fp32).

    About a 2000th of the packed weight's size, so every rank keeps it whole.
    """

    absmax: Tensor
    code: Tensor
    offset: Tensor

    def to(self, device: torch.device) -> "SecondLevel":
        return SecondLevel(self.absmax.to(device), self.code.to(device), self.offset.to(device))


@dataclass(frozen=True)
class Quantized:
    """A quantised tensor: packed uint8 [ceil(numel / 2)], absmax uint8 [ceil(numel / 64)], second level."""

    packed: Tensor
    absmax: Tensor
    second: SecondLevel


def quantize(weight: Tensor) -> Quantized:
    """Quantise a tensor of any shape (bf16, fp16 or fp32), on the device where it lies.

    Bit-equal to bitsandbytes' quantize_4bit(blocksize=64, compress_statistics=True, quant_type="nf4").
    """
    [(packed, absmax)] = quantize_blocks([weight.reshape(-1)])
    codes, second = compress_absmax(absmax)
    return Quantized(packed, codes, second)


def quantize_blocks(pieces: Iterable[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    """First level alone: each flat piece [n] gives packed uint8 [ceil(n / 2)] and absmax fp32 [ceil(n / 64)].

    Blocks know nothing of each other: a run of whole blocks quantises the same in or out of its tensor.
    """
    values = bnb.get_4bit_type("nf4", device="cpu")
    boundaries = ((values[1:] + values[:-1]) / 2).tolist()
    for piece in pieces:
        if piece.device.type == "cpu" and piece.numel() % BLOCK == 0:
            yield _count_boundaries(piece, boundaries)
        else:
            packed, absmax = torch.ops.bitsandbytes.quantize_4bit(piece, BLOCK, "nf4", torch.uint8)
            yield packed.reshape(-1), absmax


def _count_boundaries(piece: Tensor, boundaries: list[float]) -> tuple[Tensor, Tensor]:
    """The result of bitsandbytes' CPU kernel for whole blocks, bit for bit, in less than half its time.

    The kernel searches each scaled value's place among the 15 boundaries between NF4's values (torch.bucketize, three
    quarters of its time). The place is also the number of boundaries below the value, which vectorises.
    """
    blocks = piece.float().view(-1, BLOCK)
    absmax = blocks.abs().amax(1)
    scaled = (blocks * absmax.clamp(min=1e-38).reciprocal_().unsqueeze(1)).view(-1)
    codes = torch.zeros(scaled.numel(), dtype=torch.uint8)
    above = torch.empty(scaled.numel(), dtype=torch.bool)
    for boundary in boundaries:
        codes += torch.gt(scaled, boundary, out=above)
    return (codes[::2] << 4) | codes[1::2], absmax


def compress_absmax(absmax: Tensor) -> tuple[Tensor, SecondLevel]:
    """Second level: all fp32 maxima of one tensor [blocks] -> uint8 codes [blocks] and their inverse."""
    offset = absmax.mean()
    codes, state = bnb.quantize_blockwise(absmax - offset, blocksize=BLOCKS_OF_BLOCKS)
    return codes, SecondLevel(state.absmax, state.code, offset)


def dequantize(packed: Tensor, absmax: Tensor, second: SecondLevel, shape: tuple, dtype: torch.dtype) -> Tensor:
    """The weight of `shape` in `dtype` from packed [numel / 2] and absmax [blocks].

    Goes past bitsandbytes' dequantize_4bit, which transposes when its input has one row. Its CPU kernel with
    AVX512 reads wrong maxima where a row is not a whole number of blocks, so it gets one block per row.
    """
    numel = torch.Size(shape).numel()
    maxima = torch.ops.bitsandbytes.dequantize_blockwise(
        absmax, second.absmax, second.code, BLOCKS_OF_BLOCKS, torch.float32
    ).add_(second.offset)
    rows = (numel // BLOCK, BLOCK) if numel % BLOCK == 0 else (1, numel)
    return torch.ops.bitsandbytes.dequantize_4bit(packed, maxima, BLOCK, "nf4", rows, dtype).view(shape)


def multiply_packed(
    x: Tensor, packed: Tensor, absmax: Tensor, bias: Tensor | None, second: SecondLevel, shape: tuple
) -> Tensor:
    """x [..., in_features] times the weight of `shape` [out_features, in_features], plus bias, in one kernel.

    For in_features that are whole blocks. bitsandbytes has the kernel on CUDA; where it would be the slower way it
    dequantises after all, as it always does on a CPU.
    """
    level = second.absmax, BLOCK, "nf4", bias, absmax, second.code, second.offset
    return torch.ops.bitsandbytes.gemm_4bit(x, packed, shape, *level)


class NF4Linear(nn.Linear):
    """y = x W^T + b with W [out_features, in_features] frozen in NF4.

    weight: uint8 [ceil(numel / 2)]; absmax: uint8 [ceil(numel / 64)]; bias: [out_features] in the compute dtype, or
    None; all frozen. They begin on meta; a loader or `from_linear` fills them. `second` is a plain attribute: casts
    (`.bfloat16()`, an engine's own) never touch it, and moving the module to another device moves it too. Computes in
    the dtype of its input; `compute_dtype` is the dtype that the model was loaded for. A subclass of nn.Linear, so
    that PEFT's own LoRA and "all-linear" see a linear layer.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, compute_dtype: torch.dtype):
        nn.Module.__init__(self)  # nn.Linear's own would allocate the weight that must never exist
        self.in_features, self.out_features = in_features, out_features
        self.compute_dtype = compute_dtype
        numel = in_features * out_features
        self.weight = _frozen(torch.empty(-(-numel // 2), dtype=torch.uint8, device="meta"))
        self.absmax = _frozen(torch.empty(-(-numel // BLOCK), dtype=torch.uint8, device="meta"))
        values = torch.empty(out_features, dtype=compute_dtype, device="meta") if bias else None
        self.bias = cast(nn.Parameter, None if values is None else _frozen(values))  # nn.Linear's type has no None
        self.second: SecondLevel | None = None

    @classmethod
    def from_linear(cls, linear: nn.Linear, compute_dtype: torch.dtype) -> "NF4Linear":
        """Quantise an ordinary linear layer, on the device where it lies."""
        new = cls(linear.in_features, linear.out_features, linear.bias is not None, compute_dtype)
        state = quantize(linear.weight.detach())
        new.weight, new.absmax, new.second = _frozen(state.packed), _frozen(state.absmax), state.second
        if linear.bias is not None:
            new.bias = _frozen(linear.bias.detach().to(compute_dtype))
        return new

    def dequantized(self, dtype: torch.dtype) -> Tensor:
        """The whole weight [out_features, in_features] in `dtype`; under ZeRO-3 only while gathered."""
        assert self.second is not None  # set where the weight is
        shape = (self.out_features, self.in_features)
        return dequantize(self.weight, self.absmax, self.second, shape, dtype)

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in_features] -> [..., out_features], in the dtype of x."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        shape = (self.out_features, self.in_features)
        if self._decodes_on_gpu(x):
            assert self.second is not None  # set where the weight is
            return multiply_packed(x, self.weight, self.absmax, bias, self.second, shape)
        return _FrozenLinear.apply(x, self.weight, self.absmax, bias, self.second, shape)

    def _decodes_on_gpu(self, x: Tensor) -> bool:
        """Whether `multiply_packed` is the quicker way: there dequantising costs far more than so few rows do."""
        few = x.numel() <= FEW_ROWS * self.in_features
        return x.is_cuda and few and self.in_features % BLOCK == 0 and not torch.is_grad_enabled()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "NF4Linear":
        # `fn` moves, casts, or both. An integer tensor shows where it leads without being cast.
        super()._apply(fn, recurse)
        if self.second is not None:
            probe = torch.empty(0, dtype=torch.uint8, device=self.second.absmax.device)
            self.second = self.second.to(fn(probe).device)
        return self

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, compute_dtype={self.compute_dtype}"


class _FrozenLinear(torch.autograd.Function):
    """Keeps only the packed weight for backward, and dequantises it again there."""

    @staticmethod
    def forward(ctx, x, packed, absmax, bias, second, shape):
        ctx.save_for_backward(packed, absmax)
        ctx.second, ctx.shape = second, shape
        return F.linear(x, dequantize(packed, absmax, second, shape, x.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, grad):
        packed, absmax = ctx.saved_tensors
        grad_x = grad @ dequantize(packed, absmax, ctx.second, ctx.shape, grad.dtype)
        return grad_x, None, None, None, None, None


def _frozen(tensor: Tensor) -> nn.Parameter:
    return nn.Parameter(tensor, requires_grad=False)
