"""`adamw_step_`: one AdamW step for many tensors, which yields p' - p."""

import contextlib
import itertools
from collections.abc import Hashable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..checks import DTYPES, check_betas, check_number, check_tensor, wide_dtype
from ..errors import ArgumentError, ArgumentTypeError
from ..kernels.runtime.launch_cache import LaunchCache, fingerprint
from . import reference
from .dispatch import choose_path

with contextlib.suppress(ImportError):  # without Triton, `choose_path` never names it
    from ..kernels import adamw_step as triton_adamw_step

_checked = LaunchCache()  # what the checks of `adamw_step_` returned


def check_adamw_options(lr, betas, eps, weight_decay) -> tuple[float, ...]:
    return (
        check_number("lr", lr, 0),
        *check_betas(betas),
        check_number("eps", eps, 0),
        check_number("weight_decay", weight_decay, 0),
    )


def check_adamw_step(
    params, grads, exp_avgs, exp_avg_sqs, steps, deltas, anchors, anchor_now, grad_scale, found_inf
) -> None:  # fmt: skip
    n = len(params)
    lists = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "deltas": deltas,
        "anchors": anchors,
    }
    for name, values in lists.items():
        if len(values) != n:
            raise ArgumentError(name, f"{len(values)} entries", f"{n}, as many as params")
    if not n:
        return
    for p in params:
        if not isinstance(p, Tensor) or p.dtype not in DTYPES:
            raise ArgumentTypeError(
                "params",
                getattr(p, "dtype", type(p).__name__),
                "tensors of " + " or ".join(map(str, DTYPES)),
            )
    device, dtype = params[0].device, params[0].dtype
    wide = wide_dtype(dtype)
    for i, p in enumerate(params):
        shape = tuple(p.shape)
        check_tensor("params", p, shape, device, (dtype,))
        check_tensor("grads", grads[i], shape, device, (dtype,))
        check_tensor("exp_avgs", exp_avgs[i], shape, device, (dtype, wide))
        check_tensor("exp_avg_sqs", exp_avg_sqs[i], shape, device, (exp_avgs[i].dtype,))
        if deltas[i] is not None:
            check_tensor("deltas", deltas[i], shape, device, (wide,))
        if anchors[i] is not None:
            check_tensor("anchors", anchors[i], shape, device, (dtype,))
        written = {"params": p, "exp_avgs": exp_avgs[i], "exp_avg_sqs": exp_avg_sqs[i]}
        for name, t in {**written, "deltas": deltas[i], "anchors": anchors[i]}.items():
            if t is not None and not t.is_contiguous():
                raise ArgumentError(name, f"strides {t.stride()}", "contiguous tensors")
    check_tensor("steps", steps, (n,), device, (torch.float32,))
    for name, t in (
        ("anchor_now", anchor_now),
        ("grad_scale", grad_scale),
        ("found_inf", found_inf),
    ):
        if t is not None:
            check_tensor(
                name,
                t,
                (1,) if t.dim() else (),
                device,
                (t.dtype,) if name == "anchor_now" else (torch.float32,),
            )


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
