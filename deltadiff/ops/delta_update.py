"""`delta_update_`: the Delta-LoRA update of frozen weights, W += scale (dB A' + B dA)."""

import contextlib
import functools
import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..checks import (
    HALF_DTYPES,
    NO_ROUNDING,
    REMAINDER_DTYPES,
    ROUNDINGS,
    check_matrix,
    check_number,
    check_tensor,
    wide_dtype,
)
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.runtime.launch_cache import LaunchCache, fingerprint
from . import reference
from .dispatch import choose_path

with contextlib.suppress(ImportError):  # without Triton, `choose_path` never names it
    from ..kernels import delta_update as triton_delta_update

_checked = LaunchCache()  # what the checks of `delta_update_` returned


def check_delta_update(lists, scales, rounding, remainders, seed, step, apply) -> str:
    names = ("weight", "lora_A", "lora_B", "delta_A", "delta_B", "scale", "remainder")
    n = len(lists[0])
    for name, values in zip(names, (*lists, scales, remainders or lists[0]), strict=True):
        if len(values) != n:
            raise ArgumentError(name, f"{len(values)} entries", f"{n}, as many as weight")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentTypeError("seed", repr(seed), "an int that fits 64 bits")
    if rounding not in (None, NO_ROUNDING, *ROUNDINGS):
        raise ArgumentError(
            "rounding", repr(rounding), f"None or one of {', '.join((NO_ROUNDING, *ROUNDINGS))}"
        )
    for i, (w, a, b, da, db) in enumerate(zip(*lists, strict=True)):
        check_matrix("weight", w)
        check_tensor("weight", w, tuple(w.shape), lists[0][0].device, (lists[0][0].dtype,))
        check_matrix("lora_A", a)
        wide = wide_dtype(w.dtype)
        (n_out, k), r = w.shape, a.shape[0]
        check_tensor("lora_A", a, (r, k), w.device, (w.dtype, wide))
        check_tensor("lora_B", b, (n_out, r), w.device, (a.dtype,))
        check_tensor("delta_A", da, (r, k), w.device, (wide,))
        check_tensor("delta_B", db, (n_out, r), w.device, (wide,))
        check_number("scale", scales[i])
        if remainders and w.dtype in HALF_DTYPES:
            check_tensor(
                "remainder", remainders[i], (n_out, k), w.device, (REMAINDER_DTYPES[w.dtype],)
            )
    for name, t in (("step", step), ("apply", apply)):
        if isinstance(t, Tensor) and n:
            check_tensor(
                name, t, (), lists[0][0].device, (torch.int64,) if name == "step" else (t.dtype,)
            )
    if not n or lists[0][0].dtype not in HALF_DTYPES:
        return NO_ROUNDING
    if rounding is None and remainders:
        return "remainder"
    if rounding in (None, NO_ROUNDING):
        raise ArgumentError(
            "rounding",
            repr(rounding),
            f"remainder, stochastic or nearest for a {lists[0][0].dtype} weight",
        )
    if rounding == "remainder" and not remainders:
        raise ArgumentError(
            "remainder",
            "None",
            "a tensor like weight, zeros at the start, for rounding='remainder'",
        )
    return rounding


# ------------------------------------------------------------------- delta_update


def _as_list(tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else list(tensors)


def delta_update_(
    weight: Tensor | Sequence[Tensor],
    lora_A: Tensor | Sequence[Tensor],
    lora_B: Tensor | Sequence[Tensor],
    delta_A: Tensor | Sequence[Tensor],
    delta_B: Tensor | Sequence[Tensor],
    *,
    scale: float | Sequence[float],
    rounding: str | None = None,
    remainder: Tensor | Sequence[Tensor] | None = None,
    seed: int = 0,
    step: int | Tensor = 0,
    apply: Tensor | None = None,
    backend: str | None = None,
) -> Tensor | Sequence[Tensor]:
    """W += scale (dB A' + B dA) in place: the Delta-LoRA update (Algorithm 1).

    Equal to scale (B'A' - BA), in one pass over W with float32 accumulation and no temporary of its
    size. Give one weight, or lists of equal length (one dtype, one device, any shapes) for one
    launch over all of them.

    Args:
        weight: (N, K) float32, bfloat16, float16 (float64 goes to the reference).
        lora_A, lora_B: A' (r, K) and B' (N, r), the values after the optimizer step; the dtype of
            W or float32.
        delta_A, delta_B: A' - A and B' - B as `adamw_step_` yields them; float32 (float64 with a
            float64 W).
            Where a factor is not finite, what it adds to becomes NaN or infinite.
        scale: ``update_ratio * scaling``, one number or one a weight.
        rounding: for a 16-bit W (a wider one needs none, and it is ignored there):
            "remainder" keeps the bits that W cannot hold in ``remainder``: float32 arithmetic;
            "stochastic" is unbiased, its bits a function of seed, step, position in the list and
            element;
            "nearest" loses every change below half a unit in the last place.
            None is "remainder" where one is given; else a 16-bit W is refused.
        remainder: like W; int16 for bfloat16, float16 for float16; zeros at the start.
        seed, step: of the random bits; ``step`` an int or a 0-dim int64 tensor on the device.
        apply: 0-dim tensor on the device; where it is zero nothing is changed (no host read).
        backend: None chooses (see `choose_path`); a name asks for one.

    Returns:
        ``weight``.

    Raises:
        ArgumentTypeError, ArgumentError: dtypes, devices, shapes or lengths that do not fit;
            nothing was changed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    single = isinstance(weight, Tensor)
    lists = [_as_list(t) for t in (weight, lora_A, lora_B, delta_A, delta_B)]
    n = len(lists[0])
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * n
    remainders = [] if remainder is None else _as_list(remainder)
    flags = [t for t in (step, apply) if isinstance(t, Tensor)]
    sizes = tuple(map(len, (*lists, remainders, flags)))
    key = fingerprint([*itertools.chain(*lists), *remainders, *flags])
    if key and type(seed) is int and all(type(number) in (int, float) for number in scales):
        key = key, sizes, tuple(scales), str(rounding), seed
    else:
        key = None
    check = functools.partial(
        check_delta_update, lists, scales, rounding, remainders, seed, step, apply
    )
    rounding = _checked.get(key, check)
    if n:
        path = choose_path(lists[0][0].device, lists[0][0].dtype, backend)
        if not isinstance(step, Tensor):
            step = torch.tensor(step, dtype=torch.int64, device=lists[0][0].device)
        args = *lists, scales, rounding, remainders, seed, step, apply
        run_delta_update(path.backend, *args, key=key)
    return weight if single else lists[0]


def run_delta_update(backend: str, *args, key: Hashable | None = None) -> None:
    """`delta_update_` without its checks, for callers that checked once.

    ``key`` stands for all ``args``; what is prepared for it is used again.
    """
    increment_version(args[0])  # a backward pass that still needs the old weight must say so
    if backend == "triton":
        triton_delta_update.delta_update_(*args, key)
    elif backend == "cpp":
        torch.ops.deltadiff.delta_update_(*args)
    else:
        reference.delta_update_list_ref_(*args)
