"""Which kernel runs an operation, and why: this file alone decides it.

`backends` says which ways of running an operation there are, and whether one is there.

`lora_linear` has several *kernels*, and a backend may choose among them by the number of tokens of
each call. `KERNELS` says which layers and which numbers of tokens a kernel takes. To add a kernel,
add its entry there, and its launchers to the imports of `backends`.
"""

import functools
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch

from ..checks import DTYPES, HALF_DTYPES
from ..errors import ArgumentTypeError, BackendUnavailableError
from .backends import HALF_NAMES, check_backend, why_unavailable
from .transforms import TRANSFORMED

# ------------------------------------------------------------------ the kernels of lora_linear


class Layer(NamedTuple):
    """All that the choice of a kernel of `lora_linear` looks at, beside the number of tokens."""

    n: int  # out_features
    k: int  # in_features
    r: int
    dtype: torch.dtype
    dropout: bool = False
    transposed: bool = False  # W is stored (in, out)
    fp8_block: tuple[int, int] | None = None  # of W in float8_e4m3fn: rows and columns of a scale


ANY_NUMBER = range(sys.maxsize)


def _no_objection(layer: Layer) -> None:
    return None


@dataclass(frozen=True)
class Kernel:
    """One kernel of `lora_linear`, or one set of kernels that run its two passes.

    Attributes:
        backend: the backend that it belongs to.
        why_not: None for a layer that the kernel takes, else the reason in words.
        why_only_asked: None for a layer for which the kernel may be chosen, else the reason why it
            runs only if its backend is asked for by name.
        tokens: the numbers of tokens that it takes.
        gate_reads_x: whether it computes the gate's gradient from x.
    """

    name: str
    backend: str
    why_not: Callable[[Layer], str | None] = _no_objection
    why_only_asked: Callable[[Layer], str | None] = _no_objection
    tokens: range = ANY_NUMBER
    gate_reads_x: bool = False

    @property
    def label(self) -> str:
        """The name of the backend, and of the kernel where the backend has several."""
        return self.name if self.name == self.backend else f"{self.backend} {self.name}"

    def objection(self, layer: Layer, tokens: int) -> str | None:
        """None for a call that the kernel takes, else the reason in words."""
        if reason := self.why_not(layer):
            return reason
        if tokens < self.tokens.start:
            return f"{self.label} takes {self.tokens.start:,} tokens or more"
        if tokens >= self.tokens.stop:
            return f"{self.label} takes up to {self.tokens.stop - 1:,} tokens"
        return None


def _why_not_hopper(layer: Layer) -> str | None:
    if layer.dropout:
        return "the sm_90 kernel has no dropout"
    if layer.r > 256:
        return f"rank {layer.r} > 256"
    if layer.n % 8 or layer.k % 8:
        return f"{layer.n} x {layer.k}: TMA needs rows of a multiple of 16 bytes"
    return None


def _why_hopper_only_if_asked(layer: Layer) -> str | None:
    return "W is stored (in, out), which the sm_90 kernel would copy" if layer.transposed else None


def _why_not_fp8(layer: Layer) -> str | None:
    if layer.fp8_block == (128, 128):
        return _why_no_fp8_product(layer)
    return _why_no_scales(layer, "128 x 128, of rows") or _why_no_fp8_product(layer)


def _why_not_scaled_mm(layer: Layer) -> str | None:
    if layer.dtype != torch.bfloat16:
        return "torch._scaled_mm gives bfloat16 only"
    return _why_no_scales(layer, "rows") or _why_no_fp8_product(layer)


def _why_no_scales(layer: Layer, accepted: str) -> str | None:
    if layer.fp8_block is not None:
        rows, columns = layer.fp8_block
        if columns < layer.k or 1 < rows < layer.n:
            return f"scales of {rows} x {columns}: it takes those of {accepted}, or one for W"
    return None


def _why_no_fp8_product(layer: Layer) -> str | None:
    if layer.fp8_block is None:
        return "W is not in float8_e4m3fn; see `quantise_`"
    if layer.dropout:
        return "products in FP8 have no dropout"
    if layer.r > 256:
        return f"rank {layer.r} > 256"
    if layer.n % 16 or layer.k % 16:
        return f"{layer.n} x {layer.k}: products in FP8 need multiples of 16"
    return None


def _why_not_few_tokens(layer: Layer) -> str | None:
    if layer.dropout:
        return "the kernel for few tokens has no dropout"
    if layer.dtype not in HALF_DTYPES:
        return f"the kernel for few tokens is for {HALF_NAMES}"
    if layer.r > 64:
        return f"rank {layer.r} > 64"
    if layer.n % 8 or layer.k % 8:  # rows that start anywhere cannot be loaded ahead
        return f"{layer.n} x {layer.k}: the kernel for few tokens needs multiples of 8"
    return None


# In order of preference: the first kernel of a backend without an objection to a call runs it.
KERNELS = (
    Kernel(
        "hopper", "hopper", _why_not_hopper, _why_hopper_only_if_asked,
        # With fewer tokens the kernels of "triton" are faster. Blocks of 128 tokens are numbered in
        # 15 bits.
        tokens=range(256, 128 * 0x7FFF + 1),
    ),
    Kernel("fp8", "fp8", _why_not_fp8, tokens=range(256, 128 * 0x7FFF + 1)),
    Kernel("scaled_mm", "scaled_mm", _why_not_scaled_mm, tokens=range(256, sys.maxsize)),
    Kernel("few_tokens", "triton", _why_not_few_tokens, tokens=range(512)),
    Kernel("portable", "triton"),
    Kernel("cpp", "cpp", gate_reads_x=True),
    Kernel("reference", "reference"),
)  # fmt: skip


# The backend whose kernels run the calls that none of a backend's own takes. Every other backend
# has a kernel that takes all calls.
FALLBACKS = {"hopper": "triton", "fp8": "triton", "scaled_mm": "triton"}


FP8_PRODUCTS = ("fp8", "scaled_mm")  # whose kernels multiply by a weight in FP8, the faster first


class Run(NamedTuple):
    """A kernel, the numbers of tokens at which it runs the calls of a layer, and why.

    The reason says why no preferred kernel runs them; it is empty where no kernel is preferred.
    """

    tokens: range
    kernel: Kernel
    reason: str


@functools.lru_cache(maxsize=256)
def runs_of(backend: str, layer: tuple) -> tuple[Run, ...]:
    """The kernels that run the calls of a layer by ``backend``, by rising number of tokens.

    The number of tokens alone chooses among them, so that the backward pass finds what the forward
    pass kept, wherever x and W lie by then. ``layer`` holds the fields of a `Layer`; in each call,
    a plain tuple takes the host less time to make.
    """
    layer = Layer(*layer)
    names = backend, FALLBACKS.get(backend)
    candidates = [kernel for name in names for kernel in KERNELS if kernel.backend == name]
    bounds = {bound for kernel in candidates for bound in (kernel.tokens.start, kernel.tokens.stop)}
    found: list[Run] = []
    for start in sorted(bounds - {ANY_NUMBER.stop}):
        objections = []
        for kernel in candidates:
            objection = kernel.objection(layer, start)
            if objection is None:
                break
            objections.append(objection)
        if found and found[-1].kernel is kernel:
            continue
        if found:
            found[-1] = found[-1]._replace(tokens=range(found[-1].tokens.start, start))
        found.append(Run(range(start, ANY_NUMBER.stop), kernel, "; ".join(objections)))
    return tuple(found)


def kernel_at(runs: tuple[Run, ...], tokens: int) -> Kernel:
    """The kernel that runs a call of so many tokens."""
    for run in runs:  # a loop takes a third of the time that a generator does
        if tokens in run.tokens:
            return run.kernel
    raise ValueError(f"{tokens} tokens")


def keeps_x(backend: str, need_A: bool, need_gate: bool) -> bool:
    """Whether the backward pass by ``backend`` reads x, so that the forward pass must keep it.

    dA always needs x. Where A is frozen, as in a step on the gates, x need not be kept unless the
    kernel computes the gate's gradient from it. `csrc/lora_linear_autograd.cpp` has the same rule.
    """
    return need_A or (need_gate and any(k.gate_reads_x for k in KERNELS if k.backend == backend))


# ---------------------------------------------------------------------------------- the choice


@dataclass(frozen=True)
class Dispatch:
    """Which backend runs, and why that one.

    Attributes:
        runs: for a layer, which kernels run at which number of tokens; empty for the operations
            other than `lora_linear`.
    """

    backend: str
    reason: str
    runs: tuple[Run, ...] = ()

    def at(self, tokens: int) -> Kernel:
        """The kernel that runs a call of `lora_linear` with so many tokens."""
        return kernel_at(self.runs, tokens)

    def in_words(self) -> str:
        """What runs at which number of tokens.

        For instance "triton few_tokens (up to 511 tokens), triton portable (more)".
        """
        if len(self.runs) < 2:
            return self.runs[0].kernel.label if self.runs else self.backend
        words = []
        for run in self.runs:
            bounds = f"{run.tokens.start:,} to {run.tokens.stop - 1:,} tokens"
            if run is self.runs[0]:
                bounds = f"up to {run.tokens.stop - 1:,} tokens"
            elif run is self.runs[-1]:
                bounds = "more"
            words.append(f"{run.kernel.label} ({bounds})")
        return ", ".join(words)


@functools.lru_cache(maxsize=256)
def choose_path(
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None = None,
    layer: tuple[int, int, int] | None = None,
    dropout: bool = False,
    transposed: bool = False,
    transformed: bool = False,
    fp8_block: tuple[int, int] | None = None,
) -> Dispatch:
    """Choose what runs an operation on tensors of ``dtype`` on ``device``.

    Args:
        backend: asks for one by name; None chooses one.
        layer: (out_features, in_features, r) for `lora_linear`, which has a kernel of its own for
            most layers on sm_90; None for the other operations.
        dropout: whether the layer has dropout, which that kernel lacks.
        transposed: whether W is stored (in, out), like GPT-2's; that kernel would copy it.
        transformed: what the function of this name says; then only the reference will do.
        fp8_block: the block of a weight in float8_e4m3fn, see `Float8`; None for other weights.

    Returns:
        The backend, the reason for it and, for a layer, which kernels run at which number of
        tokens.

    Raises:
        ArgumentError: there is no such backend.
        BackendUnavailableError: ``backend`` was asked for and cannot run here, or not under a
            transform.
    """
    call = None if layer is None else Layer(*layer, dtype, dropout, transposed, fp8_block)
    if backend is not None:
        objection = why_unavailable(backend, device, dtype) or _why_not_taken(backend, call)
        if transformed and backend != "reference":
            raise BackendUnavailableError(
                "backend", f"{backend!r} under {TRANSFORMED}", "None or 'reference'"
            )
        if objection:
            raise BackendUnavailableError(
                "backend",
                f"{backend!r} for {dtype} on {device}: {objection}",
                "a backend that `deltadiff info` lists as there",
            )
        return _dispatch(backend, "asked for", call)
    if transformed:
        return _dispatch("reference", TRANSFORMED, call)
    refused = ""
    for name in ("cpp",) if device.type == "cpu" else ("hopper", "triton"):
        objection = _objection(name, device, dtype, call)
        if objection is None:
            return _dispatch(name, _why_chosen(name, device, refused if call else ""), call)
        refused = objection
    return _dispatch("reference", refused, call)


def choose_decoder(device: torch.device, dtype: torch.dtype, backend: str | None) -> str:
    """The backend that decodes a weight of few bits to ``dtype``.

    Raises:
        ArgumentTypeError, ArgumentError: the dtype or the backend is none.
        BackendUnavailableError: ``backend`` cannot run here.
    """
    if dtype not in DTYPES:
        given = dtype if isinstance(dtype, torch.dtype) else type(dtype).__name__
        raise ArgumentTypeError("dtype", given, " or ".join(map(str, DTYPES)))
    if backend is not None:
        check_backend(backend)
    return choose_path(device, dtype, backend).backend


def choose_fp8_path(
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    layer: tuple[int, int, int],
    dropout: bool,
    fp8_block: tuple[int, int] | None,
) -> Dispatch:
    """`choose_path` for a layer over a weight in FP8, which computes in ``dtype``."""
    path = choose_path(device, dtype, backend, layer, dropout, fp8_block=fp8_block)
    if path.backend in FP8_PRODUCTS:
        return replace(path, reason=f"{path.reason}; products in FP8")
    reason = f"{path.reason}; FP8 weight: decoded in each pass"
    call = Layer(*layer, dtype, dropout, fp8_block=fp8_block)
    for name in FP8_PRODUCTS:
        if not (why_unavailable(name, device, dtype) or _why_not_taken(name, call)):
            reason += f" (backend={name!r} multiplies in FP8)"
            break
    return replace(path, reason=reason)


def choose_4bit_path(
    device: torch.device,
    dtype: torch.dtype,
    backend: str | None,
    layer: tuple[int, int, int],
    dropout: bool,
    blocksize: int,
) -> Dispatch:
    """`choose_path` where another library has a product for W too, called backend "reference".

    On a CPU that of bitsandbytes is faster, but wrong (in 0.50) unless rows of W are whole blocks.
    """
    if backend is None and device.type == "cpu" and layer[1] % blocksize == 0:
        return Dispatch("reference", "which is faster on a CPU")
    return choose_path(device, dtype, backend, layer, dropout)


def _dispatch(backend: str, reason: str, layer: Layer | None) -> Dispatch:
    return Dispatch(backend, reason, runs_of(backend, layer) if layer else ())


def _objection(
    backend: str, device: torch.device, dtype: torch.dtype, layer: Layer | None
) -> str | None:
    """None where ``backend`` may be chosen without being asked for, else the reason in words."""
    objection = why_unavailable(backend, device, dtype) or _why_not_taken(backend, layer)
    if objection is None and layer:
        preferences = (k.why_only_asked(layer) for k in KERNELS if k.backend == backend)
        objection = next(filter(None, preferences), None)
    return objection


def _why_not_taken(backend: str, layer: Layer | None) -> str | None:
    """None where a kernel of ``backend`` takes the layer, else the reason in words."""
    if layer is None:
        return "for lora_linear only" if backend in FALLBACKS else None
    reasons = [kernel.why_not(layer) for kernel in KERNELS if kernel.backend == backend]
    return None if None in reasons else reasons[0]


def _why_chosen(backend: str, device: torch.device, no_hopper: str) -> str:
    if backend == "cpp":
        return "CPU: native C++"
    if backend == "hopper":
        return "sm_90: one launch forward, one backward"
    major, minor = torch.cuda.get_device_capability(device)
    on_sm_90 = (major, minor) == (9, 0)
    why = f" ({no_hopper})" if no_hopper and on_sm_90 else ""
    return f"sm_{major}{minor}: portable Triton kernels{why}"
