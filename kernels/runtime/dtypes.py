"""The dtypes of weights and activations that the kernels take: the one table of the Python side.

`deltadiff.checks` makes its tables from this one, and `csrc/dtypes.h` is the list of the C++ side.
This file needs no Triton, so that it can be imported without.

To add a 16-bit dtype, add its line here and in `csrc/dtypes.h`, and how it is stored to
`csrc/simd.h`. What becomes of the bits that it cannot hold stands in `deltadiff/ops/reference.py`,
which is the specification, in `rounding.py` and in `csrc/delta_update_kernel.h`. `deltadiff verify`
runs through all dtypes of this table; add it to the tests in `tests/ops` as well.
"""

import functools
import importlib
from typing import NamedTuple

import torch


class Facts(NamedTuple):
    """What there is to know about one dtype.

    Attributes:
        remainder: for 16 bits, the dtype of the remainder that can be kept beside such a weight.
        tensor_map: for 16 bits, its number in CUDA's CUtensorMapDataType, which TMA reads.
    """

    remainder: torch.dtype | None = None
    tensor_map: int | None = None


# In the order in which tables show them.
DTYPES = {
    torch.float32: Facts(),
    torch.bfloat16: Facts(remainder=torch.int16, tensor_map=9),
    torch.float16: Facts(remainder=torch.int16, tensor_map=6),
}


@functools.cache
def triton_dtype(dtype: torch.dtype):
    """The same dtype in Triton's language, whose dtypes have the names that PyTorch gives them.

    Gluon's dtypes are these very objects, in Triton 3.6 and in later versions.
    """
    name = str(dtype).removeprefix("torch.")
    name = {"float8_e4m3fn": "float8e4nv"}.get(name, name)
    return getattr(importlib.import_module("triton.language"), name)
