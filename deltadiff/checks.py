"""Checks of arguments, all before anything is changed. Each error names the argument."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .errors import ArgumentError, ArgumentTypeError
from .reference import ROUNDINGS

DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
HALF_DTYPES = (torch.bfloat16, torch.float16)


def check_tensor(
    name: str, t: Tensor, shape: tuple, device: torch.device, dtypes: Sequence[torch.dtype]
) -> None:
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(name, type(t).__name__, "a torch.Tensor")
    if hasattr(t, "device_mesh"):
        raise ArgumentTypeError(name, "a DTensor", "a plain tensor (gather it first)")
    if t.dtype not in dtypes:
        raise ArgumentTypeError(name, f"dtype {t.dtype}", " or ".join(map(str, dtypes)))
    if t.device != device:
        raise ArgumentTypeError(name, f"device {t.device}", str(device))
    if tuple(t.shape) != shape:
        raise ArgumentError(name, f"shape {tuple(t.shape)}", f"shape {shape}")


def check_number(name: str, value: object, least: float = -math.inf) -> float:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", "a float")
    if not math.isfinite(value) or value < least:
        raise ArgumentError(
            name, repr(value), "a finite number" + (f" >= {least:g}" if least > -math.inf else "")
        )
    return float(value)


def check_int(name: str, value: object, least: int) -> int:
    accepted = f"an int >= {least}"
    if not isinstance(value, int) or isinstance(value, bool):
        raise ArgumentTypeError(name, f"{value!r} ({type(value).__name__})", accepted)
    if value < least:
        raise ArgumentError(name, value, accepted)
    return value


def check_betas(betas: object) -> tuple[float, float]:
    accepted = "two floats in [0, 1)"
    if not isinstance(betas, Sequence) or len(betas) != 2:
        raise ArgumentTypeError("betas", repr(betas), accepted)
    for beta in betas:
        if not 0 <= check_number("betas", beta) < 1:
            raise ArgumentError("betas", repr(betas), accepted)
    return float(betas[0]), float(betas[1])


def check_matrix(name: str, t: Tensor) -> None:
    if not isinstance(t, Tensor):
        raise ArgumentTypeError(name, type(t).__name__, "a torch.Tensor")
    if t.dtype not in DTYPES:
        raise ArgumentTypeError(name, f"dtype {t.dtype}", " or ".join(map(str, DTYPES)))
    if t.dim() != 2 or t.numel() == 0:
        raise ArgumentError(
            name,
            f"shape {tuple(t.shape)}",
            "two dimensions, not empty (a sharded weight must be gathered first)",
        )


def check_lora_linear(x, weight, lora_A, lora_B, scaling, gate, bias) -> None:
    check_matrix("weight", weight)
    check_matrix("lora_A", lora_A)
    check_number("scaling", scaling)
    (n, k), r = weight.shape, lora_A.shape[0]
    adapter_dtypes = (x.dtype,) if x.dtype == torch.float64 else (x.dtype, torch.float32)
    check_tensor("x", x, (*x.shape[:-1], k), x.device, (weight.dtype,))
    check_tensor("weight", weight, (n, k), x.device, DTYPES)
    check_tensor("lora_A", lora_A, (r, k), x.device, adapter_dtypes)
    check_tensor("lora_B", lora_B, (n, r), x.device, (lora_A.dtype,))
    if bias is not None:
        check_tensor("bias", bias, (n,), x.device, (x.dtype,))
    if gate is not None:
        scalar = isinstance(gate, Tensor) and gate.numel() == 1
        check_tensor("gate", gate, tuple(gate.shape) if scalar else (r,), x.device, DTYPES)


def check_dropout(name: str, p: object) -> float:
    accepted = "a probability >= 0 and < 1"
    if isinstance(p, bool) or not isinstance(p, (int, float)):
        raise ArgumentTypeError(name, f"{p!r} ({type(p).__name__})", accepted)
    if not 0 <= p < 1:
        raise ArgumentError(name, repr(p), accepted)
    return float(p)


def check_seed(seed: object, device: torch.device) -> Tensor:
    """The 0-dim int64 tensor on ``device`` that ``seed`` is, or stands for."""
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, (), device, (torch.int64,))
        return seed
    if not isinstance(seed, int) or isinstance(seed, bool):
        given = f"{seed!r} ({type(seed).__name__})"
        raise ArgumentTypeError("seed", given, "an int, or a 0-dim int64 tensor")
    if not -(2**63) <= seed < 2**63:
        raise ArgumentError("seed", seed, "an int that fits 64 bits")
    return torch.full((), seed, dtype=torch.int64, device=device)


def check_delta_update(lists, scales, rounding, remainders, seed, step, apply) -> str:
    names = ("weight", "lora_A", "lora_B", "delta_A", "delta_B", "scale", "remainder")
    n = len(lists[0])
    for name, values in zip(names, (*lists, scales, remainders or lists[0]), strict=True):
        if len(values) != n:
            raise ArgumentError(name, f"{len(values)} entries", f"{n}, as many as weight")
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**63:
        raise ArgumentTypeError("seed", repr(seed), "an int that fits 64 bits")
    if rounding not in (None, *ROUNDINGS):
        raise ArgumentError("rounding", repr(rounding), f"None or one of {', '.join(ROUNDINGS)}")
    for i, (w, a, b, da, db) in enumerate(zip(*lists, strict=True)):
        check_matrix("weight", w)
        check_tensor("weight", w, tuple(w.shape), lists[0][0].device, (lists[0][0].dtype,))
        check_matrix("lora_A", a)
        wide = torch.float64 if w.dtype == torch.float64 else torch.float32
        (n_out, k), r = w.shape, a.shape[0]
        check_tensor("lora_A", a, (r, k), w.device, (w.dtype, wide))
        check_tensor("lora_B", b, (n_out, r), w.device, (a.dtype,))
        check_tensor("delta_A", da, (r, k), w.device, (wide,))
        check_tensor("delta_B", db, (n_out, r), w.device, (wide,))
        check_number("scale", scales[i])
        if remainders and w.dtype in HALF_DTYPES:
            check_tensor(
                "remainder", remainders[i], (n_out, k), w.device, (remainder_dtype(w.dtype),)
            )
    for name, t in (("step", step), ("apply", apply)):
        if isinstance(t, Tensor) and n:
            check_tensor(
                name, t, (), lists[0][0].device, (torch.int64,) if name == "step" else (t.dtype,)
            )
    if not n or lists[0][0].dtype not in HALF_DTYPES:
        return "none"
    if rounding is None and remainders:
        return "remainder"
    if rounding in (None, "none"):
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


def remainder_dtype(dtype: torch.dtype) -> torch.dtype:
    """dtype of the remainder that is kept beside a 16-bit weight."""
    return torch.int16 if dtype == torch.bfloat16 else dtype


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
    wide = torch.float64 if dtype == torch.float64 else torch.float32
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
