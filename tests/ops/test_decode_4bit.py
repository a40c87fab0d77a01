"""Weights of 4 bits are decoded to bitsandbytes' bits, on every backend."""

import itertools

import pytest
import torch
from four_bit import FORMATS, four_bit, params_4bit

from deltadiff.errors import ArgumentError, ArgumentTypeError, BackendUnavailableError
from deltadiff.ops.decode_4bit import BLOCKSIZES, FourBit, decode_4bit

bnb = pytest.importorskip("bitsandbytes")

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("form", FORMATS, ids=str)
def test_the_reference_gives_the_bits_of_bitsandbytes(form, dtype, randn):
    for stored, shape in itertools.product((F32, BF16), ((3, 256), (160, 128), (1, 4096))):
        weight = params_4bit(randn(*shape, dtype=stored, scale=0.05), *form)
        weight.quant_state.dtype = dtype
        theirs = bnb.functional.dequantize_4bit(weight.data, weight.quant_state)
        ours = decode_4bit(FourBit.of(weight), dtype, backend="reference")
        assert ours.dtype == dtype and ours.is_contiguous() and torch.equal(ours, theirs)


def test_blocks_that_reach_over_the_end_of_a_row(randn):
    """Here the kernel of bitsandbytes for the CPU is wrong, so its own reference is asked."""
    from bitsandbytes.backends.default.ops import _dequantize_4bit_compute

    for shape, blocksize in (((7, 33), 32), ((5, 70), 64), ((9, 96), 64), ((3, 1), 4096)):
        weight = four_bit(w := randn(*shape, scale=0.05), "nf4", blocksize, False)
        packed, absmax, code = weight.tensors[:3]
        with torch.compiler.set_stance("force_eager"):
            theirs = _dequantize_4bit_compute(packed, absmax, code, blocksize, shape, F32)
        ours = decode_4bit(weight, F32, backend="reference")
        assert torch.equal(ours, theirs) and (ours - w).abs().max() < 0.15 * w.abs().max()


SHAPES = [(64, 64), (7, 33), (128, 64), (1, 1), (5, 4104), (130, 63)]  # (64, 64): all words whole


@pytest.mark.parametrize("blocksize", BLOCKSIZES)
def test_every_path_gives_the_bits_of_the_reference(blocksize, path, dtype, randn):
    backend = None if path.backend == "cpp" else path.backend
    kinds = itertools.cycle(itertools.product(("nf4", "fp4"), (False, True)))
    for shape, (kind, nested) in zip(SHAPES, kinds, strict=False):
        weight = four_bit(randn(*shape, scale=0.05), kind, blocksize, nested, device=path.device)
        found = decode_4bit(weight, dtype, backend=backend)
        assert found.dtype == dtype
        assert torch.equal(found, decode_4bit(weight, dtype, backend="reference"))


def test_memory_that_begins_anywhere(path, randn):
    weight = four_bit(randn(128, 64), "nf4", 64, True, device=path.device)
    moved = {
        name: torch.cat([t.new_zeros(3), t.flatten()])[3:].view(t.shape)
        for name, t in zip(weight._fields, weight.tensors, strict=False)
    }
    expected = decode_4bit(weight, F32, backend="reference")
    backend = None if path.backend == "cpp" else path.backend
    assert torch.equal(decode_4bit(weight._replace(**moved), F32, backend=backend), expected)


@pytest.mark.filterwarnings("ignore:invalid value:RuntimeWarning")  # NumPy's, which interprets
def test_infinite_and_missing_numbers_stay_in_their_block(path, randn):
    weight = four_bit(randn(2, 128), "nf4", 64, False, device=path.device)
    weight.absmax[1], weight.absmax[2] = torch.nan, torch.inf
    backend = None if path.backend == "cpp" else path.backend
    blocks = decode_4bit(weight, F32, backend=backend).view(4, 64)
    assert blocks[[0, 3]].isfinite().all() and blocks[1].isnan().all()
    assert not blocks[2].isfinite().any()


@pytest.mark.parametrize("storage", [BF16, F32, torch.int8], ids=str)
def test_bytes_that_are_stored_as_another_dtype(storage, randn):
    """FSDP shards parameters of one dtype, so QLoRA's models store the bytes as that."""
    w = randn(64, 64)
    as_bytes, otherwise = (FourBit.of(params_4bit(w, storage=s)) for s in (torch.uint8, storage))
    assert torch.equal(as_bytes.packed, otherwise.packed)


def test_weights_that_are_no_4_bits(randn):
    with pytest.raises(ArgumentTypeError, match="weight: got a Parameter that is not quantised"):
        FourBit.of(torch.nn.Parameter(randn(4, 4)))
    with pytest.raises(ArgumentTypeError, match="Params4bit that is not quantised.*to\\(device"):
        FourBit.of(bnb.nn.Params4bit(randn(4, 4)))
    weight = params_4bit(randn(64, 64))
    weight.quant_state.quant_type = "nf3"
    with pytest.raises(ArgumentError, match="quant_type: got 'nf3'; accepted: 'nf4' or 'fp4'"):
        FourBit.of(weight)
    weight.quant_state.quant_type = "nf4"
    weight.quant_state.packing_format_for_cpu = True
    with pytest.raises(ArgumentError, match="repacked for products on the CPU"):
        FourBit.of(weight)


def test_what_does_not_fit_is_named(randn):
    weight = four_bit(randn(64, 64), "nf4", 64, True)
    for name, value, told in (
        ("absmax", weight.absmax[1:], r"weight.absmax: got shape \(63,\); accepted: shape \(64,\)"),
        ("absmax", weight.absmax.float(), "weight.absmax: got dtype torch.float32.*torch.uint8"),
        ("code", weight.scale_code, r"weight.code: got shape \(256,\); accepted: shape \(16,\)"),
        ("scale", None, "weight.scale: got NoneType"),
        ("blocksize", 48, "weight.blocksize: got 48; accepted: one of 32, 64"),
        ("scale_blocksize", 0, "weight.scale_blocksize: got 0"),
        ("shape", (64, 65), r"weight.packed: got shape \(2048,\); accepted: shape \(2080,\)"),
        ("packed", weight.packed.view(-1, 1), r"weight.packed: got shape \(2048, 1\)"),
        ("packed", weight.packed.repeat(2)[::2], "weight.packed: got strides"),
    ):
        with pytest.raises(ArgumentError, match=told):
            decode_4bit(weight._replace(**{name: value}), F32)
    with pytest.raises(ArgumentTypeError, match="weight: got Tensor; accepted: a FourBit"):
        decode_4bit(weight.packed, F32)
    with pytest.raises(ArgumentTypeError, match="dtype: got torch.int8"):
        decode_4bit(weight, torch.int8)
    with pytest.raises(BackendUnavailableError, match="float64 goes to the reference"):
        decode_4bit(weight, torch.float64, backend="triton")
