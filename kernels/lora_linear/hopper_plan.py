"""The launches of `hopper_launch`, written down as numbers for `csrc/lora_linear_cuda.cpp`."""

from dataclasses import replace

import torch

from ..runtime.plan import Place, Workspace, write_down
from .hopper import COLUMN_ITEMS_RANK
from .hopper_config import pitch_of
from .hopper_launch import (
    Work,
    fits_tma,
    kept_shape,
    kernel_call,
    needs_no_packing,
    pack_call,
    packed_shapes,
    set_zeros_aside,
)

# The tensors that the launches read and write: inputs; U and S, V and T, each pair in one tensor; y
# or dx; gradients; memory; sync. csrc/lora_linear_cuda.cpp has the same list.
X, WEIGHT, LORA_A, LORA_B, GATE, BIAS, DY, US, VT, Y, DA, DB, MEMORY, SYNC = range(14)


def _given(t) -> list:
    return [] if t is None else [t]


def lora_linear_plan(x, weight, lora_A, lora_B, gate, bias, dy, need_A, need_B) -> list[int]:
    """The launches of `lora_linear_fwd`, or with ``dy`` of `lora_linear_bwd`, as numbers.

    They depend on dtypes, shapes, strides and alignment alone. The numbers are the width of what
    the forward pass keeps, the bytes of memory, the int32 entries of sync, whether the launches
    make dA and dB, the number of launches, and then each launch as `runtime.plan` writes it. The
    list is empty where TMA cannot read a tensor where it lies, so that Python must copy it.
    """
    if not all(map(fits_tma, (x, weight, *_given(dy)))):
        return []
    device, (m, r) = x.device, (x.shape[0], lora_A.shape[0])
    given = enumerate((x, weight, lora_A, lora_B, gate, bias, dy))
    x, weight, lora_A, lora_B, gate, bias, dy = (Place.of(*pair) for pair in given)
    c, n = weight.shape if dy is not None else weight.shape[::-1]
    needs = None if dy is None else (need_A, need_B)
    work, memory = Work.of(device, m, n, c, r, needs), Workspace(MEMORY)
    launches = []
    set_zeros_aside(device)  # for graphs, whose launches Python makes

    a, b = lora_A, lora_B
    if not needs_no_packing(a, b, x.dtype):
        shape_a, shape_b = packed_shapes(a, b)
        a, b = memory.empty(shape_a, x.dtype), memory.empty(shape_b, x.dtype)
        launches.append(pack_call(lora_A, a, lora_B, b))
        b = replace(b, shape=lora_B.shape)

    gated = gate is not None
    (u, s), y = _kept_places(US, m, r, x.dtype, gated), Place.dense(Y, x.dtype, (m, n))
    sync = Place.dense(SYNC, torch.int32, (work.flags,))
    if dy is None:
        tensors = x, weight, a, b, u, s, u, x, y, gate, bias
        launches.append(kernel_call(work, *tensors, sync, 1.0, r))
    else:
        v, t = _kept_places(VT, m, r, x.dtype, gated)
        da = Place.dense(DA, lora_A.dtype, lora_A.shape)
        db = Place.dense(DB, lora_B.dtype, lora_B.shape)
        parts = memory.empty(work.parts, torch.float32)
        tensors = dy, weight, b, a, v, t, u, x, y, gate, None
        launches.append(kernel_call(work, *tensors, sync, 1.0, r, da, db, parts))
    width, made = kept_shape(m, r, gated)[1], r <= COLUMN_ITEMS_RANK
    numbers = [width, memory.nbytes, work.flags, int(made), len(launches)]
    for (kernel, grid, _, *args), options in launches:
        numbers += write_down(kernel, grid, *args, **options)
    return numbers


def _kept_places(slot, m, r, dtype, gated):
    """The places of `hopper_launch._kept_views` in a plan."""
    u = Place.dense(slot, dtype, (m, pitch_of(r)))
    s = Place.dense(slot, torch.float32, (m, r), u.numel() * dtype.itemsize)
    return u, s if gated else None
