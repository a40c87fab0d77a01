"""Copies the low-rank factors into the form that TMA needs; `hopper_launch.py` launches it."""

import triton
import triton.language as tl


@triton.jit(
    do_not_specialize=[
        "N", "K", "R", "blocks_a", "stride_ar", "stride_ak", "stride_bn", "stride_br", "pitch"
    ]
)  # fmt: skip
def _pack_kernel(
    a_ptr, packed_a_ptr, b_ptr, packed_b_ptr, N, K, R, blocks_a,
    stride_ar, stride_ak, stride_bn, stride_br, pitch, BLOCK_SIZE: tl.constexpr,
):  # fmt: skip
    """Store both low-rank factors in another dtype, B with rows of ``pitch`` elements."""
    pid = tl.program_id(0)
    if pid < blocks_a:
        offs = pid * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        row, column = offs // K, offs % K
        values = tl.load(a_ptr + row * stride_ar + column * stride_ak, mask=row < R, other=0.0)
        tl.store(packed_a_ptr + offs, values.to(packed_a_ptr.dtype.element_ty), mask=row < R)
    else:
        offs = (pid - blocks_a) * BLOCK_SIZE + tl.arange(0, BLOCK_SIZE)
        row, column = offs // R, offs % R
        values = tl.load(b_ptr + row * stride_bn + column * stride_br, mask=row < N, other=0.0)
        packed_b_ptrs = packed_b_ptr + row * pitch + column
        tl.store(packed_b_ptrs, values.to(packed_b_ptr.dtype.element_ty), mask=row < N)
