"""Weights and layers in FP8, quantised from random ones."""

import inspect

import pytest
import torch
from torch import nn

from deltadiff import quantise_
from deltadiff.ops.decode_fp8 import Float8, decode_fp8
from deltadiff.ops.reference_fp8 import quantise_fp8_ref

BLOCKS = [(128, 128), (1, None), (None, None)]  # None is the whole side: rows, and one scale


def float8(w, block=(128, 128), device="cpu") -> Float8:
    block = tuple(side or size for side, size in zip(block, w.shape, strict=True))
    data, scale = quantise_fp8_ref(w.to(device, torch.float32), block)
    return Float8(data, scale, block)


def fp8_linear(n, k, block=(128, 128), bias=True, dtype=torch.float32, seed=0, **options):
    """transformers' layer, with a random weight; ``block`` None is one scale for all of it."""
    kind = pytest.importorskip("transformers.integrations.finegrained_fp8").FP8Linear
    known = inspect.signature(kind).parameters
    if "has_bias" not in known and (block is None or options):
        pytest.skip("the layer of transformers 4 has blocks alone")
    options["has_bias" if "has_bias" in known else "bias"] = bias
    generator = torch.Generator().manual_seed(seed)
    layer = kind(k, n, block_size=block, **options)
    data, scale, _ = float8(torch.randn(n, k, generator=generator) * k**-0.5, block or (n, k))
    stored = layer.weight_scale_inv
    layer.weight = nn.Parameter(data, requires_grad=False)
    scale = scale.to(stored.dtype).view(stored.shape)
    layer.weight_scale_inv = nn.Parameter(scale, requires_grad=False)
    if bias:
        layer.bias = nn.Parameter(torch.randn(n, generator=generator).to(dtype))
    return layer


def float8_linear(n, k, granularity="block", bias=True, dtype=torch.float32):
    """deltadiff's own layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(k, n, bias=bias, dtype=dtype))
    quantise_(model, "fp8", granularity=granularity)
    return model[0]


def dense_of(layer) -> nn.Linear:
    """The float64 layer of what the numbers of a layer in FP8 stand for."""
    w = decode_fp8(Float8.of(layer), torch.float64)
    dense = nn.Linear(*w.shape[::-1], bias=layer.bias is not None, dtype=torch.float64)
    dense.weight.data.copy_(w)
    if layer.bias is not None:
        dense.bias.data.copy_(layer.bias)
    return dense
