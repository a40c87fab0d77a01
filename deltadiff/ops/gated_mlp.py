"""`gated_mlp`: the whole block down(act(gate(x)) * up(x)) of three `lora_linear`, with less kept.

Layer by layer, the input of each layer is kept for the backward pass. The block keeps x and what
comes out of the inner layers; the input of the outer one is their product, which is made again.
Where a kernel makes dA of the outer layer beside the gradients of that product, it is not even
written again.
"""

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_matrix
from ..errors import ArgumentError, BackendUnavailableError
from .dispatch import keeps_x
from .gated_product import gated_product, gated_product_bwd, gated_product_bwd_and_da, takes_da
from .lora_linear import autocast_dtype, check_lora_linear, path_of
from .lora_linear_passes import (
    bwd_before_da,
    dense_or_packed,
    kernel_of,
    run_bwd,
    run_fwd,
)
from .quantised import Quantised, decoded, first_rows, is_quantised
from .recomputing import is_recomputing
from .reference_blocks import ACTIVATIONS, LowRankLinear, gated_mlp_ref
from .remade import Remade, made_of, remade_of, sources_of
from .transforms import wants_reference

_TENSORS = 4  # of each layer that may have gradients: lora_A, lora_B, gate, bias


class _Layer(NamedTuple):
    """The arguments of a layer, and the backend that runs it."""

    weight: Tensor | Quantised
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    bias: Tensor | None
    scaling: float
    backend: str

    def trained(self) -> list[bool]:
        """For each tensor, and x before them, whether it may need a gradient."""
        tensors = self.lora_A, self.lora_B, self.gate, self.bias
        return [True, *(t is not None and t.requires_grad for t in tensors)]

    def reads_x(self, needs: Sequence[bool]) -> bool:
        """Whether the backward pass reads x, if it has to give these gradients."""
        return keeps_x(self.backend, needs[1], needs[3])

    def first_outputs(self) -> "_Layer":
        """The layer with its first outputs alone, which keeps the same for the backward pass."""
        # What the kernels for a matrix, or for few bits, need at least; so the same one runs.
        count = 8 if isinstance(self.weight, Tensor) else 16
        bias = None if self.bias is None else self.bias[:count]
        weight = first_rows(self.weight, count)
        return self._replace(weight=weight, lora_B=self.lora_B[:count], bias=bias)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and what the backward pass needs beside x."""
        return run_fwd(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, self.gate, self.bias,
            0.0, None, self.backend,
        )  # fmt: skip

    def backward(
        self, dy: Tensor, x: Tensor | None, kept: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of x, lora_A, lora_B, gate and bias."""
        gradients = run_bwd(
            dy, x, self.weight, self.lora_A, self.lora_B, kept, self.scaling, self.gate, needs[:4],
            0.0, None, self.backend,
        )  # fmt: skip
        wanted = [g if need else None for g, need in zip(gradients, needs[:4], strict=True)]
        return [*wanted, self._bias_gradient(dy, needs)]

    def backward_before_da(
        self, dy: Tensor, kept: Tensor, needs: Sequence[bool]
    ) -> tuple[Tensor | None, list[Tensor | None]]:
        """V (M, r or more), for dA = V^T x, and `backward`'s gradients without that of lora_A.

        V is None where no kernel gives it; then nothing was computed.
        """
        dx, v, *gradients = bwd_before_da(
            dy, self.weight, self.lora_A, self.lora_B, kept, self.scaling, self.gate, needs[:4],
            self.backend,
        )  # fmt: skip
        if v is None:
            return None, []
        return v, [dx, None, *gradients, self._bias_gradient(dy, needs)]

    def _bias_gradient(self, dy: Tensor, needs: Sequence[bool]) -> Tensor | None:
        return dy.sum(0, dtype=torch.float32).to(dy.dtype) if needs[4] else None


class _Plan(NamedTuple):
    """What is no tensor in a call. The outer layer comes last."""

    activation: str
    rest: tuple[tuple[float, str], ...]  # scaling and backend of each layer
    up_to_h: bool  # whether the result is the product, which the outer layer reads

    def layers(self, weights: Sequence[Any], tensors: Sequence[Any]) -> list[_Layer]:
        """The layers, whose tensors come one after the other in ``tensors``."""
        each = zip(*[iter(tensors)] * _TENSORS, strict=True)
        parts = zip(weights, each, self.rest, strict=True)
        return [_Layer._make((w, *of_layer, *rest)) for w, of_layer, rest in parts]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        plan: _Plan,
        weights: Sequence[Tensor | Quantised],
        remade: Remade | None,
        *tensors: Tensor | None,
    ) -> Tensor:
        *inner, outer = plan.layers(weights, tensors)
        rows = x.reshape(-1, x.shape[-1])
        outputs, kept = zip(*(layer.forward(rows) for layer in inner), strict=True)
        e, g = _halves(outputs)
        h = gated_product(e, g, plan.activation)
        y, kept_outer = (outer.first_outputs() if plan.up_to_h else outer).forward(h)
        reads_x = any(layer.reads_x(layer.trained()) for layer in inner)
        sources, ctx.again = sources_of(x, remade, reads_x)
        dense, ctx.packed = zip(*map(dense_or_packed, weights), strict=True)
        ctx.save_for_backward(*dense, *tensors, *outputs, *kept, kept_outer, *sources)
        ctx.plan = plan
        return h if plan.up_to_h else y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, len(ctx.plan.rest)
        assert not plan.up_to_h  # a pass that is run again has no backward pass of its own
        saved = iter(ctx.saved_tensors)

        def take(n: int) -> list[Any]:
            return list(itertools.islice(saved, n))

        dense = take(count)
        weights = [d if p is None else p for d, p in zip(dense, ctx.packed, strict=True)]
        tensors, outputs, kept = take(_TENSORS * count), take(count - 1), take(count)
        with torch.set_grad_enabled(wants_reference(dy)):
            x = made_of(tuple(saved), ctx.again)
        layers = plan.layers(weights, tensors)
        need_x, _, _, _, *rest = ctx.needs_input_grad
        if wants_reference(dy):
            dx, *found = _derivable(dy, x, layers, plan.activation, [need_x, *rest])
            return dx, None, None, None, *found
        *inner, outer = layers
        needs = [(True, *rest[i : i + _TENSORS]) for i in range(0, len(rest), _TENSORS)]
        leading, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
        d_outputs, last = _outer_backward(outer, dy, outputs, kept.pop(), needs[-1], plan)
        rows = None if x is None else x.reshape(-1, inner[0].lora_A.shape[1])
        dx, gradients = None, []
        for layer, d_output, keep, need in zip(inner, d_outputs, kept, needs, strict=False):
            more, *of_layer = layer.backward(d_output, rows, keep, (need_x, *need[1:]))
            gradients += of_layer
            if need_x:
                dx = more if dx is None else dx.add_(more)
        dx = None if dx is None else dx.view(*leading, dx.shape[1])
        return dx, None, None, None, *gradients, *last


class _Outer(torch.autograd.Function):
    """The outer layer alone, in a pass that is run again: nothing is kept of it."""

    @staticmethod
    def forward(ctx: Any, h: Tensor, layer: _Layer) -> Tensor:
        return layer.forward(h)[0]


def _outer_backward(
    layer: _Layer,
    dy: Tensor,
    outputs: Sequence[Tensor],
    kept: Tensor,
    needs: Sequence[bool],
    plan: _Plan,
) -> tuple[list[Tensor], Sequence[Tensor | None]]:
    """The gradients of the inner layers' outputs, and those of the outer layer's tensors.

    The first are written over the outputs, unless these are read once more (``retain_graph``).
    """
    e, g = _halves(outputs)
    r, v = layer.lora_A.shape[0], None
    if needs[1] and takes_da(e, r):
        v, gradients = layer.backward_before_da(dy, kept, needs)
    if v is None:
        h = gated_product(e, g, plan.activation) if layer.reads_x(needs) else None
        gradients = layer.backward(dy, h, kept, needs)
        del h
    dh, *gradients = gradients
    assert dh is not None  # it was asked for
    if not _keeps_graph():
        d_outputs = list(outputs)
    elif len(outputs) == 1:
        d_outputs = [torch.empty_like(outputs[0])]
    else:
        d_outputs = [dh, torch.empty_like(outputs[1])]
    de, dg = _halves(d_outputs)
    if v is None:
        gated_product_bwd(e, g, dh, plan.activation, de, dg)
    else:
        da = gated_product_bwd_and_da(e, g, dh, v, r, plan.activation, de, dg)
        gradients[0] = da.to(layer.lora_A.dtype)
    return d_outputs, gradients


def _halves(outputs: Sequence[Tensor]) -> tuple[Tensor, Tensor]:
    """e and g: two outputs, or the two halves of one."""
    e, g = outputs if len(outputs) == 2 else outputs[0].chunk(2, -1)
    return e, g


def _keeps_graph() -> bool:
    """Whether the backward pass that runs now may run again over the same tensors."""
    ask = getattr(torch._C._autograd, "_get_current_graph_task_keep_graph", None)
    return ask is None or bool(ask())


def _derivable(
    dy: Tensor,
    x: Tensor | None,
    layers: Sequence[_Layer],
    activation: str,
    needed: Sequence[bool],
) -> list[Tensor | None]:
    """The gradients by PyTorch's own operations, see `wants_reference`."""
    if x is None:
        given = "a second derivative where no lora_A of the inner layers is trained"
        raise BackendUnavailableError("gated_mlp", given, "a model without lean blocks")
    create_graph, device = torch.is_grad_enabled(), dy.device.type
    tensors = [t for q in layers for t in (q.lora_A, q.lora_B, q.gate, q.bias)]
    with torch.enable_grad(), torch.autocast(device, enabled=False):
        # Aliases, so that no gradient goes on from one of them to another that it was made of.
        leaves: list[Any] = [t if t is None else t.view_as(t) for t in (x, *tensors)]
        each = zip(*[iter(leaves[1:])] * _TENSORS, strict=True)
        *inner, outer = (
            LowRankLinear._make((decoded(q.weight, dy.dtype, q.backend), *parts, q.scaling))
            for q, parts in zip(layers, each, strict=True)
        )
        y = gated_mlp_ref(leaves[0], inner, outer, activation)
    wanted = [need and t is not None for need, t in zip(needed, leaves, strict=True)]
    inputs = [t for t, want in zip(leaves, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=create_graph))
    return [next(found) if want else None for want in wanted]


def gated_mlp(
    x: Tensor,
    inner: Sequence[LowRankLinear],
    outer: LowRankLinear,
    activation: str,
    backends: Sequence[str | None] = (None, None, None),
) -> Tensor:
    """down(act(gate(x)) * up(x)), where each of the three is a `lora_linear` with its branch.

    It equals the layers one by one to rounding: the product is rounded once. For the backward pass
    it keeps x and the outputs of the inner layers, 2 M I numbers; of the same layers one by one,
    autograd keeps M I more. Gradients go to x, and to lora_A, lora_B, gate and bias of each layer.
    Second derivatives come from `reference_blocks.gated_mlp_ref`.

    Args:
        x: (..., K) of the dtype of the weights.
        inner: the layers of the gate and of the other factor, each (I, K); or one of (2 I, K) that
            computes both, the gate first.
        outer: the layer behind the product, (N, I).
        activation: of the gate: "silu", "gelu_tanh" (GELU by tanh) or "gelu".
        backends: for each layer, as for `lora_linear`.

    Returns:
        (..., N) in the dtype of x.

    Raises:
        ArgumentTypeError, ArgumentError: a dtype, device or shape does not fit.
        BackendUnavailableError: a backend cannot run here.
    """
    if activation not in ACTIVATIONS:
        raise ArgumentError("activation", repr(activation), f"one of {', '.join(ACTIVATIONS)}")
    if len(inner) not in (1, 2):
        raise ArgumentError("inner", f"{len(inner)} layers", "two, or one that computes both")
    compute = autocast_dtype(x)
    if compute is not None:
        x = x.to(compute)
        inner, outer = [_cast(layer, compute) for layer in inner], _cast(outer, compute)
    for layer in inner:
        _check(x, layer)
    width = sum(layer.weight.shape[0] for layer in inner)
    sizes = {layer.weight.shape[0] for layer in inner}
    if len(sizes) > 1 or width % 2:
        raise ArgumentError("inner", f"outputs of {width} in all", "two equal halves")
    if not is_quantised(outer.weight):
        check_matrix("outer.weight", outer.weight)
    if outer.weight.shape[1] != width // 2:
        given = "x".join(map(str, outer.weight.shape))
        raise ArgumentError("outer", f"a weight of {given}", f"{width // 2} columns")
    _check(x.new_empty((0, width // 2)), outer)
    layers = (*inner, outer)
    paths = [
        path_of(x, layer.weight, layer.lora_A, backend, False)[0]
        for layer, backend in zip(layers, backends[-len(layers) :], strict=True)
    ]
    if "reference" in paths:
        *inner, outer = (
            q._replace(weight=decoded(q.weight, x.dtype, path))
            for q, path in zip(layers, paths, strict=True)
        )
        return gated_mlp_ref(x, inner, outer, activation)
    weights = [q.weight if is_quantised(q.weight) else q.weight.detach() for q in layers]
    tensors = [t for q in layers for t in (q.lora_A, q.lora_B, q.gate, q.bias)]
    rest = tuple((q.scaling, path) for q, path in zip(layers, paths, strict=True))
    # Without the outer layer's product, which takes a third of the pass, if nobody reads that.
    up_to_h = is_recomputing() and _keeps_the_same_of_few_outputs(x, outer, paths[-1])
    plan = _Plan(activation, rest, up_to_h)
    y = _GatedMlp.apply(x, plan, weights, remade_of(x), *tensors)
    if not up_to_h:
        return y
    y = _Outer.apply(y, plan.layers(weights, tensors)[-1])
    return y.view(*x.shape[:-1], y.shape[1])


def _keeps_the_same_of_few_outputs(x: Tensor, layer: LowRankLinear, backend: str) -> bool:
    """Whether what a layer keeps is the same, bit by bit, however many outputs it has."""
    tokens = x.numel() // max(1, x.shape[-1])
    r = layer.lora_A.shape[0]
    kernel = kernel_of(tokens, layer.weight, r, x.dtype, False, backend)
    return kernel.name != "few_tokens"  # which splits sums, into parts that depend on the outputs


def _cast(layer: LowRankLinear, dtype: torch.dtype) -> LowRankLinear:
    """The layer as autocast multiplies by it: W and the bias in ``dtype``."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    if is_quantised(layer.weight):
        return layer._replace(bias=bias)
    return layer._replace(weight=layer.weight.detach().to(dtype), bias=bias)


def _check(x: Tensor, layer: LowRankLinear) -> None:
    check_lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.gate, layer.bias
    )
