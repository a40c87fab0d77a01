"""The public operations; with `step_ops` the only file that calls backends. `paths` picks one."""

import contextlib
import functools
import itertools
import warnings
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.autograd.graph import increment_version

from . import reference
from .checks import (
    HALF_DTYPES,
    check_adamw_options,
    check_adamw_step,
    check_delta_update,
    check_dropout,
    check_lora_linear,
    check_matrix,
    check_number,
    check_seed,
)
from .errors import ArgumentTypeError
from .kernels.seen import Seen, fingerprint
from .paths import CPP_MISSING, KERNELS, choose_path

with contextlib.suppress(ImportError):  # without Triton, `choose_path` never names it
    from .kernels import adamw_step as triton_adamw_step
    from .kernels import delta_update as triton_delta_update

with contextlib.suppress(ImportError, AttributeError):  # or Gluon, which is experimental
    from .kernels import lora_linear_hopper, lora_linear_plan
    from .kernels.plan import CannotPlanError

# -------------------------------------------------------------------- lora_linear


class LoraLinearFunction(torch.autograd.Function):
    """`csrc/lora_linear_autograd.cpp` in Python: where that is not built, or Triton interprets."""

    @staticmethod
    def forward(ctx, x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend):
        rows = x.reshape(-1, weight.shape[1])
        y, s = _launch(
            "lora_linear_fwd", rows, weight, lora_A, lora_B, scaling, gate, bias,
            dropout, seed, backend,
        )  # fmt: skip
        kept = x if lora_A.requires_grad else None  # for dA alone
        ctx.save_for_backward(kept, weight, lora_A, lora_B, gate, s, seed)
        ctx.scaling, ctx.dropout, ctx.backend = scaling, dropout, backend
        return y.view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    @once_differentiable
    def backward(ctx, dy):
        x, weight, lora_A, lora_B, gate, s, seed = ctx.saved_tensors
        need_x, _, need_A, need_B, _, need_gate, need_bias = ctx.needs_input_grad[:7]
        needs = [need_x, need_A, need_B, need_gate]
        n, k = weight.shape
        leading, dy = dy.shape[:-1], dy.reshape(-1, n)
        rows = None if x is None else x.reshape(-1, k)
        dx, da, db, dgate = _launch(
            "lora_linear_bwd", dy, rows, weight, lora_A, lora_B, s, ctx.scaling, gate, needs,
            ctx.dropout, seed, ctx.backend,
        )  # fmt: skip
        dx = dx.view(*leading, k) if need_x else None
        dbias = dy.sum(0, dtype=torch.float32).to(weight.dtype) if need_bias else None
        return dx, None, da, db, None, dgate, dbias, None, None, None


def _launch(name, *args):
    *args, dropout, seed, backend = args
    mask = {} if seed is None else {"dropout": dropout, "seed": seed}  # not every backend has one
    return getattr(KERNELS[backend], name)(*args, **mask)


if not CPP_MISSING:

    @torch.library.register_fake("deltadiff::lora_linear_fwd")
    def _lora_linear_fwd_shapes(
        x, weight, lora_A, lora_B, scaling, gate, bias, dropout, seed, backend
    ):  # fmt: skip
        """What torch.compile has to know: y, and the S that this backend keeps."""
        m, r = x.shape[0], lora_A.shape[0]
        gated, hopper = gate is not None, backend == "hopper"
        shape = lora_linear_hopper.kept_shape(m, r, gated) if hopper else (m, r)
        dtype = x.dtype if backend == "cpp" else torch.float32
        return x.new_empty((m, weight.shape[0])), x.new_empty(shape, dtype=dtype)

    for _name in ("lora_linear_fwd", "lora_linear_bwd"):
        torch.library.impl(f"deltadiff::{_name}_python", "default")(
            functools.partial(_launch, _name)
        )

    @torch.library.impl("deltadiff::lora_linear_plan", "default")
    def _plan(*args):
        """Once for each kind of call on sm_90."""
        try:
            return lora_linear_plan.lora_linear_plan(*args)
        except (CannotPlanError, AttributeError, KeyError) as error:  # of another Triton
            warnings.warn(f"deltadiff launches from Python, slower: {error!r}", stacklevel=2)
            return []


def _layer(weight: Tensor, lora_A: Tensor) -> tuple[int, int, int]:
    """(out_features, in_features, r), for `choose_path`."""
    try:
        (n, k), r = weight.shape, lora_A.shape[0]
    except (AttributeError, ValueError, IndexError):  # it raises, and says what does not fit
        check_matrix("weight", weight)
        check_matrix("lora_A", lora_A)
        raise
    if torch.compiler.is_compiling():  # constants, also where it takes sizes for variables
        n, k, r = (range(size).stop for size in (n, k, r))
    return n, k, r


@torch.compiler.assume_constant_result
def _lora_linear_path(
    device: torch.device, dtype: torch.dtype, asked: str | None, layer: tuple, *how: bool
):  # fmt: skip
    """The backend, and whether torch.ops.deltadiff.lora_linear reaches it."""
    backend = choose_path(device, dtype, asked, layer, *how).backend
    reached = backend == "cpp" or (device.type == "cuda" and backend in KERNELS)
    return backend, reached and not CPP_MISSING


def lora_linear(
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    *,
    scaling: float,
    gate: Tensor | None = None,
    bias: Tensor | None = None,
    dropout: float = 0.0,
    seed: Tensor | int = 0,
    backend: str | None = None,
) -> Tensor:
    """Linear layer with a low-rank branch: y = x W^T + bias + s g (x A^T) B^T (DiffoRA eq. 10).

    With ``dropout`` p, the branch sees m x / (1 - p) in the place of x. The keep mask m is a
    function of ``seed`` and of the place in x alone: the same on every backend, and made again in
    the backward pass instead of being stored.

    Differentiable in ``x``, ``lora_A``, ``lora_B``, ``gate`` and ``bias``. ``weight`` is a
    constant: its gradient is never computed, also where it requires one. For the backward pass x is
    kept only where ``lora_A`` requires a gradient (in C++ on the CPU, also where ``gate`` does).

    Args:
        x: (..., K), any leading shape and strides, also empty; float32, bfloat16, float16 or
            float64.
        weight: (N, K), the dtype of x (under autocast both are cast to the autocast dtype).
        lora_A: (r, K), the dtype of x or float32 (the usual mixed case; its gradient is then
            float32).
        lora_B: (N, r), the dtype of lora_A.
        scaling: s, ``lora_alpha / r`` (rsLoRA: ``lora_alpha / sqrt(r)``).
        gate: g, a tensor on the device with one entry or r entries; None is 1.
        bias: (N,), the dtype of x.
        dropout: p, 0 <= p < 1, rounded to 1/65536. The sm_90 kernel has none.
        seed: of the mask, an int or a 0-dim int64 tensor on the device of x; one seed, one mask. A
            tensor lets a CUDA graph or a compiled function read a new one each time.
        backend: None chooses (see `choose_path`); a name asks for one.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device or shape that does not fit.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if not isinstance(x, Tensor):
        raise ArgumentTypeError("x", type(x).__name__, "a torch.Tensor")
    if torch.is_autocast_enabled(x.device.type) and x.dtype in (torch.float32, *HALF_DTYPES):
        check_matrix("weight", weight)
        compute = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(compute), weight.detach().to(compute)
        bias = None if bias is None else bias.to(compute)
    if type(scaling) is not float:
        scaling = check_number("scaling", scaling)
    p = dropout
    if type(p) is not float or p != 0:
        p = reference.round_dropout(check_dropout("dropout", p))
    seed = check_seed(seed, x.device) if p else None
    args = x, weight, lora_A, lora_B, scaling, gate, bias
    layer = _layer(weight, lora_A)
    how = seed is not None, weight.stride(1) != 1
    backend, native = _lora_linear_path(x.device, x.dtype, backend, layer, *how)
    kernel_args = *args[:4], scaling / (1 - p), gate, bias, p, seed, backend
    if native:
        try:
            return torch.ops.deltadiff.lora_linear(*kernel_args)
        except Exception as raised:  # C++ tells only that something does not fit
            error = raised
        try:
            check_lora_linear(*args)
            raise error
        finally:  # it holds this frame, and with it x: activation checkpointing ends in one
            del error
    check_lora_linear(*args)
    if backend == "reference":
        return reference.lora_linear_ref(
            *args[:4], scaling=scaling, gate=gate, bias=bias, dropout=p, seed=seed
        )
    return LoraLinearFunction.apply(x, weight.detach(), *kernel_args[2:])


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


_checked = Seen()  # what the checks of `delta_update_` and `adamw_step_` returned


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


# --------------------------------------------------------------------- adamw_step


def adamw_step_(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.01,
    deltas: Sequence[Tensor | None] | None = None,
    anchors: Sequence[Tensor | None] | None = None,
    anchor_now: Tensor | None = None,
    grad_scale: Tensor | None = None,
    found_inf: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step for many tensors in one launch, in place, as `torch.optim.AdamW` does it.

    Also yields what the Delta-LoRA update needs (Algorithm 1): p' - p, without a second copy of p.

    Args:
        params: contiguous tensors of one device and one dtype (float32, bfloat16, float16; float64
            goes to the reference).
        grads: like params.
        exp_avgs, exp_avg_sqs: the moments, the shape of params; float32 or the dtype of params.
        steps: (n,) float32 on the device, steps done by each tensor; raised by one.
        lr, betas, eps, weight_decay: as `torch.optim.AdamW`.
        deltas: receive p' - p, float32 (float64 for float64 params); None entries are left out.
        anchors: receive p, the values before the step, where ``anchor_now`` is not zero; the dtype
            of params; None entries are left out.
        anchor_now: 0-dim tensor on the device; None is "not now".
        grad_scale: 0-dim or (1,) float32 on the device: gradients are divided by it
            (`torch.amp.GradScaler`).
        found_inf: 0-dim or (1,) float32 on the device: where not zero, the step changes nothing
            except that ``deltas`` are set to zero.
        backend: None chooses (see `choose_path`); a name asks for one.

    Raises:
        ArgumentTypeError, ArgumentError: dtypes, devices, shapes or lengths that do not fit;
            nothing was changed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    n = len(params)
    lists = [list(ts) for ts in (params, grads, exp_avgs, exp_avg_sqs)]
    outputs = [[None] * n if ts is None else list(ts) for ts in (deltas, anchors)]
    flags = (anchor_now, grad_scale, found_inf)
    options = check_adamw_options(lr, betas, eps, weight_decay)
    state = [lists[0], *lists[2:], *outputs]
    seen = fingerprint([*itertools.chain(*state), steps, *flags])
    grads_seen = fingerprint(lists[1])
    key = seen and (seen, tuple(map(len, state)))
    _checked.get(
        key and grads_seen and (key, grads_seen, len(lists[1])),
        lambda: check_adamw_step(*lists, steps, *outputs, *flags),
    )
    if n:
        backend = choose_path(lists[0][0].device, lists[0][0].dtype, backend).backend
        run_adamw_step(backend, *lists, steps, *options, *outputs, *flags, key=key)
        steps += 1 if found_inf is None else found_inf.view(()) == 0


def run_adamw_step(backend: str, *args, key: Hashable | None = None) -> None:
    """`adamw_step_` without its checks, for callers that checked once.

    ``steps`` are not raised; a gradient may be None. ``key`` stands for all tensors but the
    gradients; what is prepared for it is used again.
    """
    increment_version(args[0])
    if backend == "triton":
        triton_adamw_step.adamw_step_(*args, key)
    elif backend == "cpp":
        torch.ops.deltadiff.adamw_step_(*args)
    else:
        reference.adamw_step_list_ref_(*args)
