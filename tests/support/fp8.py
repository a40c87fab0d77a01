"""Weights in FP8, quantised from random ones."""

import torch

from deltadiff.ops.decode_fp8 import Float8
from deltadiff.ops.reference_fp8 import quantise_fp8_ref

BLOCKS = [(128, 128), (1, None), (None, None)]  # None is the whole side: rows, and one scale


def float8(w, block=(128, 128), device="cpu") -> Float8:
    block = tuple(side or size for side, size in zip(block, w.shape, strict=True))
    data, scale = quantise_fp8_ref(w.to(device, torch.float32), block)
    return Float8(data, scale, block)
