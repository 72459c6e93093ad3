"""NF4Linear and its quantisation, against bitsandbytes' own functions and an explicit F.linear."""

from types import SimpleNamespace

import bitsandbytes.functional as bnb
import pytest
import torch
from torch.autograd.graph import saved_tensors_hooks
from torch.nn import functional as F

from trainer.base.nf4 import NF4Linear, multiply_packed, quantize, quantize_blocks

SHAPES = [(64, 64), (96, 64), (32, 96), (30, 90), (7, 34), (576, 192)]


def table_dequantize(linear: NF4Linear) -> torch.Tensor:
    """The weight in fp32 by table look-ups in plain torch: no dequantise kernel takes part."""
    second, packed = linear.second, linear.weight
    maxima = second.code[linear.absmax.long()] * second.absmax.repeat_interleave(256)[: linear.absmax.numel()]
    maxima = (maxima + second.offset).repeat_interleave(64)
    nibbles = torch.stack([packed >> 4, packed & 15], dim=1).reshape(-1).long()
    numel = linear.in_features * linear.out_features
    values = bnb.get_4bit_type("nf4", device="cpu")[nibbles][:numel] * maxima[:numel]
    return values.view(linear.out_features, linear.in_features)


def linear(out_features: int, in_features: int, bias: bool = False, dtype=torch.float32) -> NF4Linear:
    torch.manual_seed(out_features * 1000 + in_features)
    return NF4Linear.from_linear(torch.nn.Linear(in_features, out_features, bias=bias), dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [*SHAPES, (9, 11)])
def test_quantisation_is_bit_equal_to_bitsandbytes(shape, dtype):
    weight = torch.randn(shape).to(dtype)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=True, quant_type="nf4")
    ours = quantize(weight)
    assert torch.equal(ours.packed, packed.reshape(-1))
    assert torch.equal(ours.absmax, state.absmax)
    assert torch.equal(ours.second.absmax, state.state2.absmax)
    assert torch.equal(ours.second.code, state.state2.code)
    assert torch.equal(ours.second.offset, state.offset)


def test_blocks_quantise_the_same_in_pieces_as_in_their_tensor():
    weight = torch.randn(3 * 640 - 32)
    packed, state = bnb.quantize_4bit(weight, blocksize=64, compress_statistics=False, quant_type="nf4")
    pieces = list(quantize_blocks(weight.split(640)))
    assert torch.equal(torch.cat([codes for codes, _ in pieces]), packed.reshape(-1))
    assert torch.equal(torch.cat([maxima for _, maxima in pieces]), state.absmax)


@pytest.mark.parametrize("scale", [1.0, 3e-39, 1e30])
def test_values_on_and_beside_the_boundaries_quantise_as_bitsandbytes_does(scale):
    values = bnb.get_4bit_type("nf4", device="cpu")
    on = (values[1:] + values[:-1]) / 2
    beside = [torch.nextafter(on, torch.full_like(on, side)) for side in (-1.0, 1.0)]
    blocks = torch.cat([torch.cat([on, *beside, values, torch.tensor([1.0, -1.0, 0.0])]), torch.zeros(64)]) * scale
    packed, state = bnb.quantize_4bit(blocks, blocksize=64, compress_statistics=False, quant_type="nf4")
    [(ours, maxima)] = quantize_blocks([blocks])
    assert torch.equal(ours, packed.reshape(-1))
    assert torch.equal(maxima, state.absmax)


@pytest.mark.parametrize("shape", SHAPES)
def test_dequantised_weight_equals_table_look_up_also_where_rows_are_no_whole_number_of_blocks(shape):
    layer = linear(*shape)
    assert torch.equal(layer.dequantized(torch.float32), table_dequantize(layer))


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("rows", [(1,), (5,), (2, 3)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_forward_and_backward_equal_linear_with_the_dequantised_weight(dtype, rows, bias):
    layer = linear(96, 64, bias, dtype)
    weight = table_dequantize(layer).to(dtype)
    x = torch.randn(*rows, 64, dtype=dtype, requires_grad=True)
    x_reference = x.detach().clone().requires_grad_()
    y, y_reference = layer(x), F.linear(x_reference, weight, layer.bias)
    assert y.dtype == dtype
    assert torch.equal(y, y_reference)
    upstream = torch.randn_like(y)
    y.backward(upstream)
    y_reference.backward(upstream)
    tolerance = 1e-6 if dtype == torch.float32 else 1e-2
    assert (x.grad - x_reference.grad).norm() <= tolerance * x_reference.grad.norm()


def test_output_without_gradient_equals_output_with():
    layer, x = linear(32, 64, bias=True), torch.randn(3, 64)
    with torch.no_grad():
        plain = layer(x)
    assert torch.equal(plain, layer(x.requires_grad_()))


def test_only_packed_bytes_are_kept_for_backward():
    layer = linear(96, 64, bias=True)
    kept: list[torch.Tensor] = []
    with saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        layer(torch.randn(4, 64, requires_grad=True))
    assert {tensor.dtype for tensor in kept} == {torch.uint8}
    assert sum(tensor.nbytes for tensor in kept) == 96 * 64 // 2 + 96 * 64 // 64


def test_weight_and_absmax_are_plain_frozen_uint8_parameters():
    layer = linear(32, 64, bias=True)
    for parameter in (layer.weight, layer.absmax):
        assert type(parameter) is torch.nn.Parameter
        assert parameter.dtype == torch.uint8
    assert not any(parameter.requires_grad for parameter in layer.parameters())
    assert {name for name, _ in layer.named_parameters()} == {"weight", "absmax", "bias"}


@pytest.mark.parametrize("cast", [lambda m: m.bfloat16(), lambda m: m.half(), lambda m: m.to(torch.float16)])
def test_casting_the_module_leaves_the_quantised_weight_alone(cast):
    layer = linear(32, 64, bias=True)
    before = layer.dequantized(torch.float32)
    cast(layer)
    assert layer.weight.dtype == layer.absmax.dtype == torch.uint8
    assert layer.second.absmax.dtype == layer.second.offset.dtype == torch.float32
    assert torch.equal(layer.dequantized(torch.float32), before)


def test_packed_bytes_that_spell_nan_survive_a_cast_to_bf16():
    layer = linear(32, 64)
    layer.weight.data.fill_(0xFF)  # pairs of these are NaN in bf16, which containers of that dtype rewrite
    layer.bfloat16()
    assert torch.equal(layer.weight, torch.full_like(layer.weight, 0xFF))


def test_second_level_follows_the_module_to_its_device():
    layer = linear(32, 64).to("meta")
    assert {t.device.type for t in (layer.second.absmax, layer.second.code, layer.second.offset)} == {"meta"}


@pytest.mark.parametrize("bias", [True, False])
def test_multiplying_by_the_packed_weight_equals_multiplying_by_the_dequantised_one(bias):
    """On a CPU bitsandbytes' op is plain operations; what is shown here is that it is given the right arguments."""
    layer, x = linear(96, 128, bias=bias), torch.randn(2, 3, 128)
    found = multiply_packed(x, layer.weight, layer.absmax, layer.bias, layer.second, (96, 128))
    expected = F.linear(x, table_dequantize(layer), layer.bias)
    assert torch.allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("rows", "in_features", "on_gpu", "gradient", "packed"),
    [
        (1, 128, True, False, True),
        (64, 128, True, False, True),
        (65, 128, True, False, False),
        (1, 100, True, False, False),  # not whole blocks
        (1, 128, False, False, False),
        (1, 128, True, True, False),
    ],
)
def test_a_gpu_multiplies_few_rows_without_a_gradient_by_the_packed_weight(rows, in_features, on_gpu, gradient, packed):
    x = SimpleNamespace(is_cuda=on_gpu, numel=lambda: rows * in_features)
    with torch.set_grad_enabled(gradient):
        assert NF4Linear(in_features, 8, False, torch.float32)._decodes_on_gpu(x) == packed


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_on_a_gpu_quantisation_and_output_equal_the_cpu():
    cpu = linear(192, 128, bias=True)
    torch.manual_seed(192 * 1000 + 128)
    gpu = NF4Linear.from_linear(torch.nn.Linear(128, 192).cuda(), torch.float32)
    x = torch.randn(5, 128)
    moved = linear(192, 128, bias=True).cuda()
    assert torch.allclose(moved(x.cuda()).cpu(), cpu(x), atol=1e-4)
    assert (gpu.weight.cpu() == cpu.weight).float().mean() > 0.999
