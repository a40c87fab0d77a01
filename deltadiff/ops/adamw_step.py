"""`adamw_step_`: one AdamW step for many tensors, which also yields p' - p."""

import contextlib
import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..checks import (
    DTYPES,
    check_betas,
    check_flag,
    check_list,
    check_number,
    check_plain,
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
    from ..kernels import adamw_step as triton_adamw_step

_checked = LaunchCache()  # the lists of tensors that `adamw_step_` has checked


def check_adamw_options(
    lr: object, betas: object, eps: object, weight_decay: object
) -> tuple[float, float, float, float, float]:
    """(lr, beta1, beta2, eps, weight_decay) as floats; raises where one is not acceptable."""
    return (
        check_number("lr", lr, 0),
        *check_betas(betas),
        check_number("eps", eps, 0),
        check_number("weight_decay", weight_decay, 0),
    )


def check_adamw_step(
    params: Sequence[Tensor],
    grads: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Tensor,
    deltas: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    anchor_now: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    copies: Sequence[Tensor | None],
    moved: Tensor | None,
) -> None:
    """Raise where the tensors of `adamw_step_` do not fit each other."""
    n = len(params)
    lists = {
        "grads": grads,
        "exp_avgs": exp_avgs,
        "exp_avg_sqs": exp_avg_sqs,
        "deltas": deltas,
        "anchors": anchors,
        "copies": copies,
    }
    for name, values in lists.items():
        if len(values) != n:
            raise ArgumentError(name, f"{len(values)} entries", f"{n}, as many as params")
    if not n:
        return
    for p in params:
        check_plain("params", p)
        if p.dtype not in DTYPES:
            accepted = "tensors of " + " or ".join(map(str, DTYPES))
            raise ArgumentTypeError("params", p.dtype, accepted)
    device, dtype = params[0].device, params[0].dtype
    wide = wide_dtype(dtype)
    for i, p in enumerate(params):
        shape = tuple(p.shape)
        check_tensor("params", p, shape, device, (dtype,))
        check_tensor("grads", grads[i], shape, device, (dtype,))
        check_tensor("exp_avgs", exp_avgs[i], shape, device, (dtype, wide))
        check_tensor("exp_avg_sqs", exp_avg_sqs[i], shape, device, (exp_avgs[i].dtype,))
        delta, anchor, copy = deltas[i], anchors[i], copies[i]
        if delta is not None:
            check_tensor("deltas", delta, shape, device, (wide,))
        if anchor is not None:
            check_tensor("anchors", anchor, shape, device, (dtype,))
        if copy is not None:
            check_tensor("copies", copy, shape, device, (dtype,))
        written = {"params": p, "exp_avgs": exp_avgs[i], "exp_avg_sqs": exp_avg_sqs[i]}
        for name, t in {**written, "deltas": delta, "anchors": anchor, "copies": copy}.items():
            if t is not None and not t.is_contiguous():
                raise ArgumentError(name, f"strides {t.stride()}", "contiguous tensors")
    check_tensor("steps", steps, (n,), device, (torch.float32,))
    if moved is not None:
        check_tensor("moved", moved, (n,), device, (torch.int32,))
        if not moved.is_contiguous():
            raise ArgumentError("moved", f"strides {moved.stride()}", "a contiguous tensor")
    flags = {"grad_scale": grad_scale, "found_inf": found_inf}
    for name, flag in flags.items():
        if flag is not None:
            shape = (1,) if isinstance(flag, Tensor) and flag.dim() else ()
            check_tensor(name, flag, shape, device, (torch.float32,))
    if anchor_now is not None:
        shape = (1,) if isinstance(anchor_now, Tensor) and anchor_now.dim() else ()
        check_flag("anchor_now", anchor_now, shape, device)
    outputs = {"params": params, **lists, "steps": [steps], "moved": [moved]}
    inputs = {"grads": outputs.pop("grads"), "anchor_now": [anchor_now], "flags": flags.values()}
    check_memory(
        *([(name, t) for name, ts in group.items() for t in ts] for group in (outputs, inputs))
    )


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
    copies: Sequence[Tensor | None] | None = None,
    moved: Tensor | None = None,
    backend: str | None = None,
) -> None:
    """One AdamW step for many tensors, in one launch and in place, as `torch.optim.AdamW` does it.

    It also writes p' - p, which the Delta-LoRA update needs (Algorithm 1), without a second copy
    of p.

    Args:
        params: n contiguous tensors of one device and one dtype (float32, bfloat16, float16;
            float64 goes to the reference). Everything that is written needs memory of its own.
        grads: tensors like params.
        exp_avgs, exp_avg_sqs: the moments, shaped like params; float32 or the dtype of params.
        steps: (n,) float32 on the device, the steps that each tensor has done; raised by one.
        lr, betas, eps, weight_decay: as in `torch.optim.AdamW`.
        deltas: tensors that receive p' - p, float32 (float64 for float64 params), or None for each
            tensor of which it is not wanted.
        anchors: tensors in the dtype of params that receive p, the values before the step, where
            ``anchor_now`` is not zero; or None, like deltas.
        anchor_now: 0-dim tensor on the device; None stands for zero.
        grad_scale: 0-dim or (1,) float32 on the device, by which the gradients are divided
            (`torch.amp.GradScaler`).
        found_inf: 0-dim or (1,) float32 on the device. Where it is not zero, the step sets
            ``deltas`` to zero and changes nothing else.
        copies: tensors in the dtype of params that receive p'; or None, like deltas.
        moved: (n,) int32 on the device, set to 1 where p was not equal to its copy before the step,
            so something else wrote p since the last one. Other entries stay. None: not compared.
        backend: None chooses one (see `choose_path`); a name asks for that one.

    Raises:
        ArgumentTypeError, ArgumentError: dtypes, devices, shapes or lengths do not fit, or the call
            is made under a transform of torch.func or forward-mode differentiation; nothing was
            changed.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    refuse_transforms("adamw_step_")
    if backend is not None:
        check_backend(backend)
    lists = (
        check_list("params", params),
        check_list("grads", grads),
        check_list("exp_avgs", exp_avgs),
        check_list("exp_avg_sqs", exp_avg_sqs),
    )
    n = len(lists[0])
    none: list[Tensor | None] = [None] * n
    outputs = (
        none if deltas is None else check_list("deltas", deltas),
        none if anchors is None else check_list("anchors", anchors),
    )
    flags = (anchor_now, grad_scale, found_inf)
    watched = none if copies is None else check_list("copies", copies), moved
    options = check_adamw_options(lr, betas, eps, weight_decay)
    state: list[Sequence[Tensor | None]] = [lists[0], *lists[2:], *outputs, watched[0]]
    seen = fingerprint([*itertools.chain(*state), steps, *flags, moved])
    grads_seen = fingerprint(lists[1])
    key = seen and (seen, tuple(map(len, state)))
    _checked.get(
        key and grads_seen and (key, grads_seen, len(lists[1])),
        lambda: check_adamw_step(*lists, steps, *outputs, *flags, *watched),
    )
    if n:
        backend = choose_path(lists[0][0].device, lists[0][0].dtype, backend).backend
        increment_version(lists[0])
        args = *lists, steps, *options, *outputs, *flags, *watched
        if backend == "triton":
            triton_adamw_step.adamw_step_(*args, key)  # prepares the launch once for each key
        else:
            _list_step(backend)(*args)
        steps += 1 if found_inf is None else found_inf.view(()) == 0


def _list_step(backend: str) -> Callable:
    """The step of the backends that take lists of tensors; ``steps`` are not raised."""
    return torch.ops.deltadiff.adamw_step_ if backend == "cpp" else reference.adamw_step_list_ref_


# --------------------------------------------------------------------------- the prepared form


def prepare_adamw_step(
    backend: str,
    params: Sequence[Tensor],
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    deltas: Sequence[Tensor | None],
    anchors: Sequence[Tensor | None],
    copies: Sequence[Tensor | None],
) -> "triton_adamw_step.AdamWStep | _AdamWList":
    """`adamw_step_` of tensors that stay where they are, prepared once for many steps.

    It checks nothing, and ``backend`` must be there. What changes from step to step (options,
    counts, addresses of gradients) it reads from the device, where the backend can.

    Returns:
        An object with the methods of `kernels.adamw_step.AdamWStep`.
    """
    state = exp_avgs, exp_avg_sqs, deltas, anchors, copies
    if backend == "triton":
        return triton_adamw_step.AdamWStep(params, *state)
    return _AdamWList(backend, params, *state)


class _AdamWList:
    """`kernels.adamw_step.AdamWStep` for the backends that take lists of tensors."""

    lr: float | Tensor
    options: Sequence[float | Tensor]  # beta1, beta2, eps, weight_decay

    def __init__(
        self,
        backend: str,
        params: Sequence[Tensor],
        exp_avgs: Sequence[Tensor],
        exp_avg_sqs: Sequence[Tensor],
        deltas: Sequence[Tensor | None],
        anchors: Sequence[Tensor | None],
        copies: Sequence[Tensor | None],
    ):
        self.backend, self.params = backend, params
        self.state = exp_avgs, exp_avg_sqs, deltas, anchors, copies
        self.numbers: Tensor | None = None

    def set_options(self, lr: float | Tensor, *options: float) -> None:
        if not self.params[0].is_cuda:
            self.lr, self.options = lr, options
            return
        numbers = 0.0 if isinstance(lr, Tensor) else lr, *options
        values = torch.tensor(numbers, dtype=torch.float64)
        if self.numbers is None:
            self.numbers = values.to(self.params[0].device)  # from now on in place: see AdamWStep
        else:
            self.numbers.copy_(values.pin_memory(), non_blocking=True)
        own_lr, *self.options = self.numbers.unbind()
        self.lr = lr if isinstance(lr, Tensor) else own_lr

    def __call__(
        self,
        grads: Tensor,
        aligned: bool,
        steps: Tensor,
        anchor_now: Tensor | None,
        grad_scale: Tensor | None,
        found_inf: Tensor | None,
        moved: Tensor | None,
    ) -> None:
        lr = self.lr.item() if isinstance(self.lr, Tensor) and not self.lr.is_cuda else self.lr
        exp_avgs, exp_avg_sqs, deltas, anchors, copies = self.state
        _list_step(self.backend)(
            self.params, [p.grad for p in self.params], exp_avgs, exp_avg_sqs, steps,
            lr, *self.options, deltas, anchors, anchor_now, grad_scale, found_inf,
            copies, moved,
        )  # fmt: skip
