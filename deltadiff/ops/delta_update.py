"""`delta_update_`: the Delta-LoRA update of frozen weights, W += scale (dB A' + B dA)."""

import contextlib
import functools
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..checks import (
    HALF_DTYPES,
    NO_ROUNDING,
    REMAINDER_DTYPES,
    ROUNDINGS,
    check_flag,
    check_int,
    check_list,
    check_matrix,
    check_number,
    check_tensor,
    wide_dtype,
)
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.runtime.launch_cache import LaunchCache, fingerprint
from . import reference
from .backends import check_backend
from .dispatch import choose_path
from .memory import check_memory
from .transforms import refuse_transforms

with contextlib.suppress(ImportError):  # without Triton, `choose_path` does not name "triton"
    from ..kernels import delta_update as triton_delta_update

_checked = LaunchCache()  # the rounding of each call that `delta_update_` has checked


def check_delta_update(
    lists: Sequence[Sequence[Tensor]],
    scales: Sequence[float],
    rounding: str | None,
    remainders: Sequence[Tensor],
    seed: int,
    step: Tensor | None,
    apply: Tensor | None,
) -> str:
    """The rounding of W; raises where the arguments of `delta_update_` do not fit each other."""
    names = ("weight", "lora_A", "lora_B", "delta_A", "delta_B", "scale", "remainder")
    n = len(lists[0])
    for name, values in zip(names, (*lists, scales, remainders or lists[0]), strict=True):
        if len(values) != n:
            raise ArgumentError(name, f"{len(values)} entries", f"{n}, as many as weight")
    check_int("seed", seed, -(2**63), bits=64)
    accepted = f"None or one of {', '.join((NO_ROUNDING, *ROUNDINGS))}"
    if not isinstance(rounding, (str, type(None))):
        raise ArgumentTypeError("rounding", type(rounding).__name__, accepted)
    if rounding not in (None, NO_ROUNDING, *ROUNDINGS):
        raise ArgumentError("rounding", repr(rounding), accepted)
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
        scale = check_number("scale", scales[i])
        if wide == torch.float32 and abs(scale) > torch.finfo(wide).max:
            raise ArgumentError("scale", scale, "a number that float32 can hold")
        if remainders and w.dtype in HALF_DTYPES:
            check_tensor(
                "remainder", remainders[i], (n_out, k), w.device, (REMAINDER_DTYPES[w.dtype],)
            )
    if n and step is not None:
        check_tensor("step", step, (), lists[0][0].device, (torch.int64,))
    if n and apply is not None:
        check_flag("apply", apply, (), lists[0][0].device)
    written = [(names[0], w) for w in lists[0]]
    if n and lists[0][0].dtype in HALF_DTYPES:
        written += [(names[-1], low) for low in remainders]
    read = [(name, t) for name, ts in zip(names[1:5], lists[1:], strict=True) for t in ts]
    check_memory(written, [*read, ("step", step), ("apply", apply)])
    if not n or lists[0][0].dtype not in HALF_DTYPES:
        return NO_ROUNDING
    if rounding is None and remainders:
        return "remainder"
    if rounding in (None, NO_ROUNDING):
        raise ArgumentError(
            "rounding",
            repr(rounding),
            f"{', '.join(ROUNDINGS[:0:-1])} or {ROUNDINGS[0]} for a {lists[0][0].dtype} weight",
        )
    if rounding == "remainder" and not remainders:
        raise ArgumentError(
            "remainder",
            "None",
            "a tensor like weight, zeros at the start, for rounding='remainder'",
        )
    return rounding


def _as_list(name: str, tensors: Tensor | Sequence[Tensor]) -> list[Tensor]:
    return [tensors] if isinstance(tensors, Tensor) else check_list(name, tensors)


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

    This equals scale (B'A' - BA). It takes one pass over W, with float32 accumulation and no
    temporary of W's size. Lists of equal length (one dtype, one device, any shapes) are updated in
    one launch. Autograd does not record the update.

    Args:
        weight: (N, K) float32, bfloat16, float16 (float64 goes to the reference).
        lora_A, lora_B: A' (r, K) and B' (N, r), the values after the optimizer step; the dtype of
            W or float32.
        delta_A, delta_B: A' - A and B' - B as `adamw_step_` writes them; float32 (float64 with a
            float64 W). Where a factor is not finite, the elements of W that it contributes to
            become NaN or infinite.
        scale: ``update_ratio * scaling``, one number or one for each weight.
        rounding: how a 16-bit W is rounded; a wider W needs none and ignores it.
            "remainder" keeps the bits that W cannot hold in ``remainder``, as if W were float32.
            "stochastic" is unbiased; its random bits are a function of seed, step, position in the
            list and place of the element.
            "nearest" loses every change below half a unit in the last place.
            None means "remainder" where ``remainder`` is given; else a 16-bit W is refused.
        remainder: int16, shaped like W, zeros at the start. Beside bfloat16 it is float32
            arithmetic exactly; beside float16 too, for 2^-16 <= |W| <= 65504 (`split_remainder`
            says what holds outside).
        seed: an int that fits 64 bits, for the random bits.
        step: an int >= 0 or a 0-dim int64 tensor on the device, for the random bits.
        apply: 0-dim tensor on the device. Where it is zero, nothing is changed; the host does not
            read it.
        backend: None chooses one (see `choose_path`); a name asks for that one.

    Returns:
        ``weight``.

    Raises:
        ArgumentTypeError, ArgumentError: dtypes, devices, shapes or lengths do not fit, or the call
            is made under a transform of torch.func or forward-mode differentiation; nothing was
            changed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    refuse_transforms("delta_update_")
    if backend is not None:
        check_backend(backend)
    single = isinstance(weight, Tensor)
    lists = (
        _as_list("weight", weight),
        _as_list("lora_A", lora_A),
        _as_list("lora_B", lora_B),
        _as_list("delta_A", delta_A),
        _as_list("delta_B", delta_B),
    )
    n = len(lists[0])
    scales = list(scale) if isinstance(scale, Sequence) else [scale] * n
    remainders = [] if remainder is None else _as_list("remainder", remainder)
    device_step = step if isinstance(step, Tensor) else None
    if device_step is None:
        check_int("step", step, 0, bits=64)  # it may differ from call to call
    flags = device_step, apply
    sizes = tuple(map(len, (*lists, remainders)))
    key = fingerprint([*itertools.chain(*lists), *remainders, *flags])
    plain = type(seed) is int and (rounding is None or type(rounding) is str)
    if key and plain and all(type(number) in (int, float) for number in scales):
        key = key, sizes, tuple(scales), rounding, seed
    else:
        key = None
    check = functools.partial(check_delta_update, lists, scales, rounding, remainders, seed, *flags)
    rounding = _checked.get(key, check)
    if n:
        backend = choose_path(lists[0][0].device, lists[0][0].dtype, backend).backend
        if device_step is None:
            device_step = torch.tensor(step, dtype=torch.int64, device=lists[0][0].device)
        args = *lists, scales, rounding, remainders, seed, device_step, apply
        increment_version(lists[0])  # a backward pass that needs the old weight must raise
        if backend == "triton":
            triton_delta_update.delta_update_(*args, key)  # prepares the launch once for each key
        else:
            _list_update(backend)(*args, [], [])
    return weight if single else lists[0]


def _list_update(backend: str) -> Callable:
    """The update of the backends that take lists of tensors."""
    return (
        torch.ops.deltadiff.delta_update_ if backend == "cpp" else reference.delta_update_list_ref_
    )


# --------------------------------------------------------------------------- the prepared form


def prepare_delta_update(
    backend: str,
    weights: Sequence[Tensor],
    lora_As: Sequence[Tensor],
    lora_Bs: Sequence[Tensor],
    delta_As: Sequence[Tensor],
    delta_Bs: Sequence[Tensor],
    scales: Sequence[float],
    rounding: str,
    remainders: Sequence[Tensor],
    seed: int,
    positions: Sequence[int],
    first_rows: Sequence[int],
) -> "triton_delta_update.DeltaUpdate | _DeltaUpdateList":
    """`delta_update_` of tensors that stay where they are, prepared once for many steps.

    It checks nothing, and ``backend`` must be there. The adapters are of one dtype.

    Args:
        positions, first_rows: the place of each weight in a longer list, and the number of its
            first row, if it is a part of a weight. The random bits of "stochastic" are those that
            the whole list of whole weights gets.

    Returns:
        An object with the methods of `kernels.delta_update.DeltaUpdate`.
    """
    lists = weights, lora_As, lora_Bs, delta_As, delta_Bs
    where = list(positions), list(first_rows)
    if backend == "triton":
        return triton_delta_update.DeltaUpdate(*lists, scales, rounding, remainders, seed, *where)
    return _DeltaUpdateList(backend, lists, scales, rounding, remainders, seed, where)


class _DeltaUpdateList:
    """`kernels.delta_update.DeltaUpdate` for the backends that take lists of tensors."""

    def __init__(
        self,
        backend: str,
        lists: tuple[Sequence[Tensor], ...],
        scales: Sequence[float],
        rounding: str,
        remainders: Sequence[Tensor],
        seed: int,
        where: tuple[list[int], list[int]],
    ):
        self.backend, self.lists, self.scales, self.where = backend, lists, scales, where
        self.options = rounding, remainders, seed

    def rescale(self, scales: Sequence[float]) -> None:
        self.scales = scales

    def __call__(self, step: Tensor, apply: Tensor | None) -> None:
        _list_update(self.backend)(
            *self.lists, self.scales, *self.options, step, apply, *self.where
        )  # fmt: skip
