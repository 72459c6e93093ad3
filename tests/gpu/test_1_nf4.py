"""Quantising and dequantising on the GPU: as bitsandbytes does there, and as the CPU does."""

import bitsandbytes.functional as bnb
import pytest
import torch

from trainer.base import nf4

SHAPES = [(4096, 14336), (1024, 4096), (60, 101)]
each_weight = pytest.mark.parametrize(
    ("shape", "dtype"), [(shape, dtype) for shape in SHAPES for dtype in (torch.bfloat16, torch.float32)]
)


def weight_of(shape: tuple[int, int], dtype: torch.dtype) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(dtype)


@each_weight
def test_quantising_gives_the_bits_of_bitsandbytes(shape, dtype):
    weight = weight_of(shape, dtype).cuda()
    found = nf4.quantize(weight)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    assert torch.equal(found.packed, packed.view(-1))
    assert torch.equal(found.absmax, state.absmax)
    assert torch.equal(found.second.absmax, state.state2.absmax)
    assert torch.equal(found.second.offset, state.offset)


@each_weight
def test_few_codes_differ_from_the_cpus(shape, dtype, figures):
    weight = weight_of(shape, dtype)
    here, there = nf4.quantize(weight), nf4.quantize(weight.cuda())
    for name in ("packed", "absmax"):
        different = (getattr(here, name) != getattr(there, name).cpu()).float().mean().item()
        figures[f"{name}: share of bytes unlike the CPU's, {shape}, {dtype}"] = different
        assert different < 1e-3


@each_weight
def test_dequantising_gives_what_the_cpu_gives(shape, dtype):
    found = nf4.quantize(weight_of(shape, torch.float32))
    here = nf4.dequantize(found.packed, found.absmax, found.second, shape, dtype)
    second = found.second.to(torch.device("cuda"))
    there = nf4.dequantize(found.packed.cuda(), found.absmax.cuda(), second, shape, dtype)
    torch.testing.assert_close(there.cpu(), here)
