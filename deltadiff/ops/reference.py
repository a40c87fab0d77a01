"""The specification: one short eager function per operation.

Layout is PyTorch's and PEFT's: ``weight`` (N, K) = (out, in), ``lora_A`` (r, K), ``lora_B`` (N, r).
Gradients come from autograd. Pass float64 tensors to get the value that kernels are held against;
these functions are also the backend of last resort.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import wide_dtype

# ---------------------------------------------------------------- random bits


def random_bits(
    shape: torch.Size,
    seed: int | Tensor,
    step: int | Tensor,
    index: int,
    device: torch.device | str,
) -> Tensor:
    """16 random bits for each element of tensor number ``index``, as int64.

    Element e (row-major) takes half ``e % 2`` (0 is the low one) of word ``(e % 8) // 2`` of the
    Philox4x32-7 block with counter (e // 8, step, index) and key ``seed``. The bits are a function
    of these alone, so they do not depend on block sizes, on other tensors or on the GPU.
    """
    block = torch.arange((shape.numel() + 7) // 8, dtype=torch.int64, device=device)
    words = philox4x32(block & MASK32, block >> 32, step & MASK32, index & MASK32, seed)
    halves = torch.stack([half for w in words for half in (w & 0xFFFF, w >> 16)], dim=1)
    return halves.flatten()[: shape.numel()].view(shape)


MASK32 = 0xFFFFFFFF


def philox4x32(
    c0: Tensor,
    c1: Tensor,
    c2: int | Tensor,
    c3: int | Tensor,
    seed: int | Tensor,
    rounds: int = 7,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Philox4x32 on int64 tensors that hold uint32 values (Salmon et al. 2011).

    Seven rounds are the fewest that pass BigCrush.
    """
    zero = torch.zeros_like(c0)
    c0, c1, c2, c3 = (zero + c for c in (c0, c1, c2, c3))
    k0, k1 = seed & MASK32, (seed >> 32) & MASK32
    for _ in range(rounds):
        p0, p1 = 0xD2511F53 * c0, 0xCD9E8D57 * c2  # wraps modulo 2^64, as it should
        c0, c2 = ((p1 >> 32) & MASK32) ^ c1 ^ k0, ((p0 >> 32) & MASK32) ^ c3 ^ k1
        c1, c3 = p1 & MASK32, p0 & MASK32
        k0, k1 = (k0 + 0x9E3779B9) & MASK32, (k1 + 0xBB67AE85) & MASK32
    return c0, c1, c2, c3


# ---------------------------------------------------------------- lora_linear


def lora_linear_ref(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: int | Tensor = 0,
) -> Tensor:
    """y = x W^T + bias + s g (d(x) A^T) B^T, with W constant (DiffoRA eq. 10; LoRA is g = 1).

    d is dropout, which acts on the low-rank branch alone: d(x) = m x / (1 - p), with the keep mask
    m of `dropout_mask_ref`. Products are computed in ``x.dtype``. ``gate`` is a scalar, or has r
    entries, which scale the columns of x A^T.
    """
    y = torch.nn.functional.linear(x, weight.detach(), bias)
    if p := round_dropout(dropout):
        x = torch.where(dropout_mask_ref(x.shape, p, seed, x.device), x, 0) / (1 - p)
    s = x @ lora_A.to(x.dtype).T
    if gate is not None:
        s = s * gate.to(x.dtype)
    return y + scaling * (s @ lora_B.to(x.dtype).T)


def round_dropout(p: float) -> float:
    """p rounded to the nearest 1/65536 below 1, since each element has 16 random bits."""
    return min(round(p * 65536), 65535) / 65536


def dropout_mask_ref(
    shape: torch.Size, p: float, seed: int | Tensor, device: torch.device | str = "cpu"
) -> Tensor:
    """The keep mask: each element of x stays with probability 1 - p, p rounded by `round_dropout`.

    The mask is a function of ``seed`` and of the element's place alone. With the rows of x padded
    to a multiple of 8, element e stays where its 16 `random_bits` (step 0, index 0) are at least
    65536 p.
    """
    *leading, width = shape
    padded = torch.Size((*leading, (width + 7) // 8 * 8))
    bits = random_bits(padded, seed, 0, 0, device)[..., :width]
    return bits >= round(round_dropout(p) * 65536)


# --------------------------------------------------------------- delta_update


def delta_update_ref_(
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    delta_A: Tensor,
    delta_B: Tensor,
    *,
    scale: float,
    rounding: str = "none",
    remainder: Tensor | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    index: int = 0,
    first_row: int = 0,
) -> Tensor:
    """W += scale (dB A' + B dA) in place (Delta-LoRA, Algorithm 1; equal to scale (B'A' - BA)).

    ``lora_A`` and ``lora_B`` are A' and B', the values *after* the optimizer step. ``delta_A`` is
    A' - A and ``delta_B`` is B' - B, so that B = B' - dB. The random bits are those of the rows
    from ``first_row`` on of a larger weight.
    """
    dtype = wide_dtype(weight.dtype)
    a, b, da, db = (t.detach().to(dtype) for t in (lora_A, lora_B, delta_A, delta_B))
    wide, low = weight.detach().to(dtype), None
    if rounding == "remainder":
        assert remainder is not None
        wide, low = join_remainder(weight.detach(), remainder), remainder
    wide = wide + scale * (db @ a + (b - db) @ da)
    with torch.no_grad():
        if low is not None:
            high, rest = split_remainder(wide, weight.dtype)
            weight.copy_(high)
            low.copy_(rest)
        elif rounding == "stochastic":
            shape = torch.Size((first_row + weight.shape[0], weight.shape[1]))
            bits = random_bits(shape, seed, step, index, weight.device)[first_row:]
            weight.copy_(round_stochastic(wide, bits, weight.dtype))
        else:
            weight.copy_(wide)
    return weight


def split_remainder(wide: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """float32 -> (16-bit value, int16 remainder); `join_remainder` is the inverse.

    bfloat16: the value is the float32 rounded to nearest (ties away from zero), and the remainder
    is what has to be added to the bits of the value, so the pair holds the float32 exactly.

    float16: the value is the float32 rounded to nearest even, and the remainder counts units of
    2^-15 of the value's last place. The pair holds the float32 exactly for 2^-16 <= |wide| <= 65504
    and is at most 2^-40 off below. A finite value past float16's range becomes +-65504, with what
    the remainder can hold of the rest.

    What is not finite stays what it is, with the remainder 0: an update that has become infinite or
    NaN shows in the weight, as it does in float32.
    """
    if dtype == torch.float16:
        finite, most = wide.isfinite(), torch.finfo(dtype).max
        high = torch.where(finite, wide.clamp(-most, most), wide).to(dtype)
        rest = torch.where(finite, wide - high.float(), 0) / _remainder_unit(high)
        return high, rest.clamp(-(2**15), 2**15 - 1).round().to(torch.int16)
    bits = wide.view(torch.int32)
    high = (bits + 0x8000) >> 16
    high = torch.where(wide.isnan(), bits >> 16, high)  # a carry must not turn NaN into a number
    low = torch.where(wide.isnan(), 0, bits - (high << 16))
    return high.to(torch.int16).view(torch.bfloat16), low.to(torch.int16)


def join_remainder(weight: Tensor, remainder: Tensor) -> Tensor:
    """(16-bit value, int16 remainder) -> float32."""
    if weight.dtype == torch.float16:
        rest = (-remainder.int()).float() * _remainder_unit(weight)
        return weight.float() - rest  # less 0, so that -0 stays -0
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def past_range(weight: Tensor, remainder: Tensor) -> Tensor:
    """Where a float16 weight is +-65504 because its float32 value rounds to no finite float16."""
    most, half = torch.finfo(torch.float16).max, 2**14  # half of the last place, as a remainder
    return ((weight == most) & (remainder >= half)) | ((weight == -most) & (remainder <= -half))


def _remainder_unit(weight: Tensor) -> Tensor:
    """2^-15 of the last place of float16 values, as float32; below 2^-14 that place is fixed."""
    exponent = weight.float().view(torch.int32) & 0x7F800000
    return (exponent.clamp(min=113 << 23) - (25 << 23)).view(torch.float32)


def round_stochastic(wide: Tensor, bits: Tensor, dtype: torch.dtype) -> Tensor:
    """Round float32 up or down to ``dtype``: up with a probability equal to the fraction lost.

    ``bits``: 16 random bits for each element. bfloat16 uses all of them, float16 the upper 13.
    """
    if dtype == torch.bfloat16:
        rounded = (wide.view(torch.int32) + bits.int() & ~0xFFFF).view(torch.float32)
    else:
        rounded = (wide.view(torch.int32) + (bits.int() >> 3) & ~0x1FFF).view(torch.float32)
        steps = wide.abs() * 2.0**24  # below 2^-14 float16 has a fixed spacing of 2^-24
        small = ((steps + (bits >> 3).float() * 2.0**-13).floor() * 2.0**-24).copysign(wide)
        rounded = torch.where(wide.abs() < 2.0**-14, small, rounded)
    return torch.where(wide.isfinite(), rounded, wide).to(dtype)


def delta_update_list_ref_(
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    delta_As: Sequence[Tensor],
    delta_Bs: Sequence[Tensor],
    scales: Sequence[float],
    rounding: str,
    remainders: Sequence[Tensor],
    seed: int,
    step: int | Tensor,
    apply: Tensor | None,
    positions: Sequence[int] = (),
    first_rows: Sequence[int] = (),
) -> None:
    """`delta_update_ref_` for a list; it changes nothing where the 0-dim ``apply`` is zero.

    ``positions``, ``first_rows``: ``index`` and ``first_row`` of each; 0, 1, ... and 0 by default.
    """
    tensors = (weights, lora_As, lora_Bs, delta_As, delta_Bs, scales)
    for index, (w, a, b, da, db, scale) in enumerate(zip(*tensors, strict=True)):
        low = remainders[index] if remainders else None
        with OnlyWhere(apply, w, low):
            delta_update_ref_(
                w, a, b, da, db, scale=scale, rounding=rounding,
                remainder=low, seed=seed, step=step,
                index=positions[index] if positions else index,
                first_row=first_rows[index] if first_rows else 0,
            )  # fmt: skip


class OnlyWhere:
    """Undoes changes where a 0-dim device tensor is zero, without reading it on the host."""

    def __init__(self, condition: Tensor | None, *tensors: Tensor | None):
        self.condition = condition
        self.tensors = [] if condition is None else [t for t in tensors if t is not None]

    def __enter__(self) -> None:
        self.before = [t.detach().clone() for t in self.tensors]

    def __exit__(self, *_: object) -> None:
        if self.condition is None:
            return
        with torch.no_grad():
            for t, old in zip(self.tensors, self.before, strict=True):
                t.copy_(torch.where(self.condition != 0, t, old))


# ----------------------------------------------------------------- adamw_step


def adamw_step_ref_(
    param: Tensor,
    grad: Tensor,
    exp_avg: Tensor,
    exp_avg_sq: Tensor,
    step: Tensor,
    *,
    lr: float | Tensor,
    betas: tuple[float | Tensor, float | Tensor],
    eps: float | Tensor,
    weight_decay: float | Tensor,
    delta: Tensor | None = None,
) -> Tensor:
    """One AdamW step on one tensor, in place, as `torch.optim.AdamW` (decoupled weight decay).

    ``step`` (0-dim) counts the steps done and is raised by one. ``delta`` receives p' - p, where p'
    is rounded to the parameter's dtype.
    """
    dtype = wide_dtype(param.dtype)
    with torch.no_grad():
        step += 1
        p, g, m, v = (t.detach().to(dtype) for t in (param, grad, exp_avg, exp_avg_sq))
        m = betas[0] * m + (1 - betas[0]) * g
        v = betas[1] * v + (1 - betas[1]) * g * g
        correction1, correction2 = (1 - beta ** step.double() for beta in betas)
        denominator = (v / correction2).sqrt() + eps
        new = (p * (1 - lr * weight_decay) - lr / correction1 * m / denominator).to(param.dtype)
        if delta is not None:
            delta.copy_(new.to(dtype) - p)
        param.copy_(new)
        exp_avg.copy_(m)
        exp_avg_sq.copy_(v)
    return param


def adamw_step_list_ref_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor | None],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    lr: float | Tensor,
    beta1: float | Tensor,
    beta2: float | Tensor,
    eps: float | Tensor,
    weight_decay: float | Tensor,
    deltas: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    anchor_now: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    copies: Sequence[Tensor | None],
    moved: Tensor | None,
) -> None:
    """`adamw_step_ref_` for a list, with the options of `deltadiff.adamw_step_`.

    It divides gradients by ``grad_scale``, writes the anchors and copies, and skips the step where
    ``found_inf`` is not 0. A tensor whose gradient is None takes no step. ``steps`` are not raised.
    """
    scale = None if grad_scale is None else grad_scale.view(())
    go = None if found_inf is None else found_inf.view(()) == 0
    for i, (p, g, m, v) in enumerate(zip(params, grads, exp_avgs, exp_avg_sqs, strict=True)):
        delta, anchor, copy = deltas[i], anchors[i], copies[i]
        if scale is not None and g is not None:
            g = g.to(torch.promote_types(g.dtype, torch.float32)) / scale
        with torch.no_grad(), OnlyWhere(go, p, m, v, anchor, copy, moved):
            if copy is not None and moved is not None:
                moved[i] |= ((p != copy) & (p == p)).any()
            if anchor is not None and anchor_now is not None:
                anchor.copy_(torch.where(anchor_now.view(()) != 0, p, anchor))
            if g is None:
                if delta is not None:
                    delta.zero_()
                continue
            adamw_step_ref_(
                p, g, m, v, steps[i].clone(),
                lr=lr, betas=(beta1, beta2), eps=eps, weight_decay=weight_decay, delta=delta,
            )  # fmt: skip
            if copy is not None:
                copy.copy_(p)
            if delta is not None and go is not None:
                delta.copy_(torch.where(go, delta, 0))


# -------------------------------------------------------------------- counters


def advance_counters_ref_(
    iteration: Tensor,
    steps: Tensor,
    grads: Tensor,
    firsts: Tensor,
    flags: Tensor,
    rank_scales: Tensor,
    new_scales: Tensor,
    new_from: Tensor,
    found_inf: Tensor | None,
) -> None:
    """Count one optimizer step in place, unless ``found_inf`` is not 0.

    Args:
        iteration: 0-dim int64, t, raised by one.
        steps: (n,) float32, raised by one where ``grads`` (n,) int64 is not 0.
        firsts: (g,) int64, K + 1 of each param group.
        flags: (g, 2) int32, t > K and t == K + 1 for the coming iteration.
        rank_scales: (m,) float32 or float64, Delta-LoRA's factors on the ranks; each becomes its
            entry of ``new_scales`` from its iteration in ``new_from`` (int64) on.
    """
    done = 1 if found_inf is None else (found_inf.view(()) == 0).to(torch.int64)
    iteration += done
    steps += done * (grads != 0)
    flags[:, 0] = iteration >= firsts
    flags[:, 1] = iteration == firsts
    rank_scales.copy_(torch.where(iteration >= new_from, new_scales, rank_scales))
