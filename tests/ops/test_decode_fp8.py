"""Weights in FP8: quantised by hand's rule, and decoded alike on every backend."""

import math
from types import SimpleNamespace

import pytest
import torch
from fp8 import BLOCKS, float8

from deltadiff.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from deltadiff.ops.decode_fp8 import DATA_DTYPES, Float8, check_fp8, decode_fp8
from deltadiff.ops.reference_fp8 import quantise_fp8_ref

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
E4M3, E5M2 = DATA_DTYPES


def by_hand(byte: int, exponent_bits: int) -> float:
    """The number that a byte stands for, by the definition of OCP's FP8."""
    mantissa_bits = 7 - exponent_bits
    bias = 2 ** (exponent_bits - 1) - 1
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> mantissa_bits, byte & (2**mantissa_bits - 1)
    if exponent_bits == 4 and byte & 0x7F == 0x7F:
        return math.nan
    if exponent_bits == 5 and exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - mantissa_bits)
    return sign * (1 + mantissa * 2.0**-mantissa_bits) * 2.0 ** (exponent - bias)


def decoder(path):
    return None if path.backend == "cpp" else path.backend


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which interprets
@pytest.mark.parametrize("exponent_bits", [4, 5])
def test_every_byte_is_the_number_that_it_stands_for(path, exponent_bits):
    data = torch.arange(256, dtype=torch.uint8).view(2, 128).view(DATA_DTYPES[exponent_bits - 4])
    weight = Float8(data, torch.tensor([[1.0], [-0.75]]), (1, 128))
    weight = weight._replace(data=data.to(path.device), scale=weight.scale.to(path.device))
    found = decode_fp8(weight, F32, backend=decoder(path)).flatten().tolist()
    expected = [by_hand(b, exponent_bits) * (1.0 if b < 128 else -0.75) for b in range(256)]
    assert all(a == b or math.isnan(a) and math.isnan(b) for a, b in zip(found, expected))  # noqa: B905


def test_the_quantisation_by_hand():
    w = torch.tensor([[1.0, -7.0, 0.5], [0.26, 448.0, 0.0], [0.0, 0.0, 3e-44]], dtype=F32)
    data, scale = quantise_fp8_ref(w, (2, 2))
    assert scale.tolist() == [[1.0, torch.tensor(0.5).div(448).item()], [1.0, 1.0]]
    assert data.float().tolist() == [[1, -7, 448], [0.25, 448, 0], [0, 0, 0]]
    data, scale = quantise_fp8_ref(w.double() * 2, (3, 3))
    assert scale.item() == 2 and data.dtype == E4M3 and data[1, 1].float() == 448
    # Ties go to the even neighbour: between 16 and 18, and between 18 and 20.
    assert quantise_fp8_ref(torch.tensor([[17.0, 19.0, 448.0]]), (1, 3))[0].float().tolist() == [
        [16.0, 20.0, 448.0]
    ]


@pytest.mark.parametrize("block", [*BLOCKS, (1, 128), (7, 9)], ids=str)
def test_what_is_quantised_is_near(block, randn):
    for shape in ((256, 384), (70, 130), (3, 5)):
        w = randn(*shape, scale=0.05, dtype=BF16)
        weight = float8(w, block)
        sides = tuple(side or size for side, size in zip(block, shape, strict=True))
        assert weight.scale.shape == tuple(-(-s // b) for s, b in zip(shape, sides, strict=True))
        assert weight.data.float().abs().max() == 448
        decoded = decode_fp8(weight, F32, backend="reference")
        largest = weight.scale.max() * 448
        assert ((decoded - w.float()).abs() <= w.float().abs() / 16 + largest * 2**-18).all()


@pytest.mark.parametrize("block", [*BLOCKS, (7, 9)], ids=str)
def test_all_backends_give_the_same_bits(path, block, dtype, randn):
    interpreted = path.backend == "triton" and path.device.type == "cpu"  # which is slow
    for shape in ((136, 160), (33, 1)) if interpreted else ((256, 384), (70, 1130), (33, 1)):
        weight = float8(randn(*shape, scale=0.05), block, path.device)
        for kind in DATA_DTYPES:
            weight = weight._replace(data=weight.data.to(F32).to(kind))
            found = decode_fp8(weight, dtype, backend=decoder(path))
            expected = (weight.data.to(F32) * spread(weight)).to(dtype)
            assert found.dtype == dtype and found.is_contiguous() and torch.equal(found, expected)


def spread(weight):
    """The scale of each element, block by block."""
    full, (rows, columns) = torch.empty(weight.shape, device=weight.device), weight.block
    for i, line in enumerate(weight.scale):
        for j, scale in enumerate(line):
            full[i * rows : (i + 1) * rows, j * columns : (j + 1) * columns] = scale
    return full


def test_memory_that_begins_anywhere(path, randn):
    weight = float8(randn(130, 64), device=path.device)
    data = weight.data.view(torch.uint8).flatten()
    data = torch.cat([data[:3], data])
    scale = torch.cat([weight.scale.new_zeros(1), weight.scale.flatten()])[1:].view(2, 1)
    moved = weight._replace(data=data[3:].view(E4M3).view(130, 64), scale=scale)
    expected = decode_fp8(weight, F32, backend="reference")
    assert torch.equal(decode_fp8(moved, F32, backend=decoder(path)), expected)


# ------------------------------------------------------------------------ what weights are made of


def layer_of(data, scale, block_size):
    layer = torch.nn.Module()
    layer.weight = torch.nn.Parameter(data, requires_grad=False)
    layer.weight_scale_inv = torch.nn.Parameter(scale, requires_grad=False)
    layer.block_size = block_size
    return layer


@pytest.mark.parametrize("stored", [F32, BF16, F16, torch.float8_e8m0fnu], ids=str)
def test_scales_as_checkpoints_store_them(stored, randn):
    data, scale, _ = float8(randn(130, 200))
    scale = scale.to(stored)
    weight = Float8.of(layer_of(data, scale, [128, 128]))
    assert weight.block == (128, 128) and torch.equal(weight.scale, scale.to(F32))
    assert weight.data.data_ptr() == data.data_ptr()


def test_one_scale_in_each_of_its_forms(randn):
    data, scale, _ = float8(randn(40, 30), (None, None))
    for form in (scale, scale.view(1), scale.view(())):
        weight = Float8.of(layer_of(data, form, None))
        assert weight.block == (40, 30) and weight.scale.shape == (1, 1)


def test_weights_of_torchao(randn):
    data, scale, _ = float8(randn(40, 30), (1, None))
    of_old = SimpleNamespace(float8_data=data, scale=scale.view(40))
    for weight in (
        SimpleNamespace(qdata=data, scale=scale, block_size=[1, 30]),
        SimpleNamespace(tensor_impl=of_old, block_size=(1, 30)),
    ):
        assert Float8.of(weight).block == (1, 30) and torch.equal(Float8.of(weight).scale, scale)
        check_fp8("weight", Float8.of(weight))


def test_what_is_no_weight_in_FP8(randn):
    data, scale, _ = float8(randn(130, 200))
    with pytest.raises(ArgumentTypeError, match="weight: got torch.float8_e4m3fn without scales"):
        Float8.of(data)
    with pytest.raises(ArgumentTypeError, match="weight: got torch.float32 without scales"):
        Float8.of(torch.nn.Linear(4, 4))
    with pytest.raises(ArgumentTypeError, match="weight.scale: got dtype torch.uint8; accepted"):
        Float8.of(layer_of(data, scale.to(torch.uint8), (128, 128)))
    with pytest.raises(ArgumentError, match=r"weight.scale: got shape \(2, 2\).*\(3, 4\)"):
        decode_fp8(Float8.of(layer_of(data, scale, (64, 64))), F32)


def test_what_does_not_fit_is_named(randn):
    weight = float8(randn(130, 200))
    for change, told in (
        (
            {"scale": weight.scale[1:]},
            r"weight.scale: got shape \(1, 2\); accepted: shape \(2, 2\)",
        ),
        ({"scale": weight.scale.to(BF16)}, "weight.scale: got dtype torch.bfloat16"),
        ({"scale": weight.scale.T}, r"weight.scale: got strides \(1, 2\)"),
        ({"scale": None}, "weight.scale: got NoneType"),
        ({"data": weight.data.view(torch.uint8)}, "weight.data: got dtype torch.uint8"),
        ({"data": weight.data[:, ::2], "block": (128, 50)}, "weight.data: got strides"),
        ({"data": weight.data[0]}, r"weight.data: got shape \(200,\)"),
        ({"block": (128, 0)}, "weight.block: got 0"),
        ({"block": 128}, r"weight.block: got int; accepted: \(rows, columns\)"),
        ({"block": (128.0, 128)}, "weight.block: got 128.0"),
    ):
        with pytest.raises(ArgumentError, match=told):
            decode_fp8(weight._replace(**change), F32)
    with pytest.raises(ArgumentTypeError, match="weight: got Tensor; accepted: a Float8"):
        decode_fp8(weight.data, F32)
    with pytest.raises(ArgumentTypeError, match="dtype: got torch.int8"):
        decode_fp8(weight, torch.int8)
    with pytest.raises(BackendUnavailableError, match="float64 goes to the reference"):
        decode_fp8(weight, torch.float64, backend="triton")
