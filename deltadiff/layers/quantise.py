"""`quantise_` puts layers with a weight in FP8 in the place of a model's linear layers."""

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..checks import dtype_name
from ..errors import ArgumentError, ArgumentTypeError, SwapError
from ..ops.decode_fp8 import Float8, decoded_fp8
from ..ops.reference_fp8 import E4M3, quantise_fp8_ref
from ..text import align_columns
from .base_format import base_format
from .coverage import WeightGroup, group_lines, group_weights, why_left_out
from .float8_linear import Float8Linear
from .linear import is_conv1d, is_peft_model, linear_shape
from .lora_layers import lora_layers
from .matrices import find_matrices
from .swap import replace_modules
from .targets.choose import Targets, choose_modules
from .targets.eligible import find_refused, is_linear
from .targets.heads import find_heads

if TYPE_CHECKING:
    from .linear import LinearLayer

# The rows and columns of the weight that one scale is for; None is the whole side.
GRANULARITIES = {"block": (128, 128), "row": (1, None), "tensor": (None, None)}
_BLOCK = 2**24  # elements that are quantised at once, which bounds the temporary memory


@dataclass(frozen=True)
class QuantiseRow:
    """One quantised layer.

    Attributes:
        module: its name in the model.
        shape: of its weight, (out, in).
        dtype: what the weight was before.
        error: |W' - W| / |W| of the weight, in the Frobenius norm.
    """

    module: str
    shape: tuple[int, int]
    dtype: torch.dtype
    error: float


@dataclass(frozen=True)
class QuantiseReport:
    """What `quantise_` did. It prints as a table, with a few lines on the whole model below.

    Attributes:
        rows: the layers that are quantised now.
        granularity: as it was asked for.
        before, after: the bytes of their weights, with the scales.
        total: the elements of all weights of the model.
        left_out: the other weights, with the reason.
    """

    rows: tuple[QuantiseRow, ...]
    granularity: str
    before: int
    after: int
    total: int
    left_out: tuple[WeightGroup, ...]

    def __str__(self) -> str:
        cells = [("module", "out x in", "dtype before", "relative error")]
        for r in self.rows:
            shape = f"{r.shape[0]} x {r.shape[1]}"
            cells.append((r.module, shape, dtype_name(r.dtype), f"{r.error:.2e}"))
        summary = (
            f"{len(self.rows)} layers in FP8, a scale for each {self.granularity}: "
            f"{self.after / 2**20:,.1f} MiB instead of {self.before / 2**20:,.1f}; frozen from now"
        )
        lines = [align_columns(cells, right=(1,)), summary]
        if self.left_out:
            lines += ["not quantised:", *group_lines(self.left_out, self.total, "left_out")]
        return "\n".join(lines)


@torch.no_grad()
def quantise_(
    model: nn.Module,
    format: str,
    *,
    target_modules: Targets = "all-linear",
    granularity: str = "block",
) -> QuantiseReport:
    """Keep the weights of linear layers in FP8, in place: half of the memory of 16 bits.

    An ``nn.Linear`` (or GPT-2's ``Conv1D``) becomes a `Float8Linear` with W = data * scale, for
    data of float8_e4m3fn and scale = max |w| / 448 in float32. Weights are quantised one layer
    after the other. From then on they are frozen; biases stay as they are. `swap_` takes such a
    model, and Delta-LoRA runs on it with ``w_update="factored"``. Its ``state_dict`` loads into a
    model that was quantised alike; where the granularity is "block", it is what transformers'
    FP8Linear loads. ``save_pretrained`` writes the same tensors, but no word of FP8 into the
    configuration, so ``from_pretrained`` cannot read them.

    Args:
        model: any module that contains linear layers, before `swap_` and before the optimizer.
        format: "fp8".
        target_modules: as for `swap_`: "all-linear" leaves out heads, tied weights and what
            `swap_` could not take, as the report says.
        granularity: what one scale is for: "block" of 128 x 128, "row" (out feature), "tensor".

    Returns:
        A report with the relative error of each weight, the memory, and what was left out and why;
        it prints as a table.

    Raises:
        ArgumentTypeError, ArgumentError: a value outside the limits above, targets that match
            nothing or name something that cannot be quantised, or a weight with inf or NaN.
        SwapError: the model is swapped, or wrapped for DDP.
        Nothing was changed then.
    """
    if not isinstance(model, nn.Module):
        raise ArgumentTypeError("model", type(model).__name__, "a torch.nn.Module")
    if format != "fp8":
        raise ArgumentError("format", f"{format!r:.80}", "'fp8'")
    if not isinstance(granularity, str) or granularity not in GRANULARITIES:
        accepted = ", ".join(map(repr, GRANULARITIES))
        raise ArgumentError("granularity", f"{granularity!r:.80}", accepted)
    if is_peft_model(model):
        accepted = "the base model: `quantise_` that, then `get_peft_model`"
        raise ArgumentTypeError("model", "a model with PEFT's layers", accepted)
    if lora_layers(model):
        accepted = "`quantise_` before `swap_`; `unswap_` takes the pairs out"
        raise SwapError("model", "a model with swapped layers", accepted)
    if any(isinstance(m, nn.parallel.DistributedDataParallel) for m in model.modules()):
        accepted = "`quantise_` before it wraps the model, whose parameters it knows"
        raise SwapError("model", "a model in DistributedDataParallel", accepted)
    layers, reasons = _choose(model, target_modules)
    for name, layer in layers.items():
        most = torch.finfo(torch.float32).max
        low, high = layer.weight.aminmax()
        if not (-most <= low and high <= most):
            raise ArgumentError(f"weight of {name}", "inf or NaN", "finite numbers of float32")
    rows, before, after = [], 0, 0
    for name in list(layers):
        layer = layers.pop(name)  # so that nothing holds its weight when it is replaced
        weight, error = _quantised(layer, granularity)
        new = Float8Linear(weight, layer._parameters["bias"], layer.weight.dtype)
        new.train(layer.training)
        rows.append(QuantiseRow(name, linear_shape(layer), layer.weight.dtype, error))
        before += layer.weight.nbytes
        after += weight.data.nbytes + weight.scale.nbytes
        replace_modules(model, [(layer, new)])
    heads, refused = find_heads(model), find_refused(model)
    matrices = find_matrices(model)
    left_out = [
        (m.name, reasons.get(id(m.parameter)) or why_left_out(m, heads, refused), m.elements)
        for m in matrices
        if not isinstance(m.module, Float8Linear)
    ]
    total = sum(m.elements for m in matrices)
    return QuantiseReport(tuple(rows), granularity, before, after, total, group_weights(left_out))


def _choose(model: nn.Module, targets: Targets) -> tuple[dict[str, "LinearLayer"], dict[int, str]]:
    """The layers to be quantised, each once, and by the ids of weights, why others are not."""
    tied = {id(m.parameter): (m.owner, *m.tied) for m in find_matrices(model) if m.tied}
    chosen: dict[LinearLayer, str] = {}
    reasons: dict[int, str] = {}
    for name, module in choose_modules(model, targets, to_swap=True).items():
        assert is_linear(module)
        reason = _why_not(module, tied)
        if reason is None:
            chosen.setdefault(module, name)
        else:
            reasons[id(module.weight)] = reason
            if targets != "all-linear":
                given, accepted = f"{name}: {reason}", "layers with a dense weight of their own"
                raise ArgumentTypeError("target_modules", given, accepted)
    if not chosen:
        given = f"no layer that can be quantised: {next(iter(reasons.values()))}"
        raise ArgumentTypeError("model", given, "layers with a dense weight of their own")
    return {name: module for module, name in chosen.items()}, reasons


def _why_not(module: "LinearLayer", tied: dict[int, tuple[str, ...]]) -> str | None:
    """The reason why a linear layer that `swap_` takes cannot be quantised, in words."""
    if not base_format(module).writable:
        return "its weight is quantised already"
    if id(module.weight) in tied:
        return f"its weight is tied: {' and '.join(tied[id(module.weight)])} hold the same"
    if module.weight.grad is not None:
        return "its weight has a gradient: it is being trained"
    return None


def _quantised(layer: "LinearLayer", granularity: str) -> tuple[Float8, float]:
    """The weight of a layer in FP8, and its relative error."""
    w = layer.weight.T if is_conv1d(layer) else layer.weight
    n, k = w.shape
    side, columns = GRANULARITIES[granularity]
    block = side or n, columns or k
    data = torch.empty(n, k, dtype=E4M3, device=w.device)
    scale = w.new_empty(-(-n // block[0]), -(-k // block[1]), dtype=torch.float32)
    sums = torch.zeros(2, dtype=torch.float64, device=w.device)
    count = max(1, _BLOCK // k // block[0])  # blocks of rows at once
    for first in range(0, len(scale), count):
        scales = slice(first, first + count)
        rows = slice(first * block[0], (first + count) * block[0])
        data[rows], scale[scales] = quantise_fp8_ref(w[rows], block)
        sums += _squares(w[rows], Float8(data[rows], scale[scales], block))
    lost, norm = sums.tolist()
    return Float8(data, scale, block), math.sqrt(lost / norm) if norm else 0.0


def _squares(w: Tensor, weight: Float8) -> Tensor:
    """|W' - W|^2 and |W|^2."""
    wide = w.to(torch.float32)
    lost = decoded_fp8(weight, torch.float32, "reference") - wide
    return torch.stack([t.square().sum(dtype=torch.float64) for t in (lost, wide)])
