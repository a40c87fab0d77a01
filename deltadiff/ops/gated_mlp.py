"""`gated_mlp`: the whole block down(act(gate(x)) * up(x)) of three `lora_linear`, with less kept.

Layer by layer, the input of each layer is kept for the backward pass. The block keeps x and what
comes out of the inner layers; the input of the outer one is their product, which is made again.
Where a kernel makes dA of the outer layer beside the gradients of that product, it is not even
written again.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_matrix
from ..errors import ArgumentError, BackendUnavailableError
from .dispatch import keeps_x
from .gated_product import gated_product, gated_product_bwd, gated_product_bwd_and_da, takes_da
from .lora_linear import autocast_dtype, check_lora_linear, path_of
from .lora_linear_autograd import bwd_before_da, passes
from .reference_blocks import ACTIVATIONS, LowRankLinear, gated_mlp_ref
from .remade import Remade, remade_of

_TENSORS = 5  # of each layer, as in `LowRankLinear`


class _Layer(NamedTuple):
    """The tensors of one layer, and which backend runs it."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor | None
    bias: Tensor | None
    scaling: float
    backend: str
    native: bool

    def trained(self) -> list[bool]:
        """For each tensor, and x before them, whether it may need a gradient."""
        tensors = self.lora_A, self.lora_B, self.gate, self.bias
        return [True, *(t is not None and t.requires_grad for t in tensors)]

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """y, and what the backward pass needs beside x."""
        run = passes(self.native)[0]
        return run(
            x, self.weight, self.lora_A, self.lora_B, self.scaling, self.gate, self.bias,
            0.0, None, self.backend,
        )  # fmt: skip

    def backward(
        self, dy: Tensor, x: Tensor | None, kept: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The gradients of x, and of the tensors of the layer in order."""
        run = passes(self.native)[1]
        dx, *gradients = run(
            dy, x, self.weight, self.lora_A, self.lora_B, kept, self.scaling, self.gate, needs[:4],
            0.0, None, self.backend,
        )  # fmt: skip
        return [dx, None, *gradients, self._bias_gradient(dy, needs)]

    def backward_before_da(
        self, dy: Tensor, kept: Tensor, needs: Sequence[bool]
    ) -> list[Tensor | None]:
        """The same but dA, with V (M, r or more) behind dx, from which and x dA = V^T x.

        V is None where no kernel gives it; then nothing was computed.
        """
        dx, v, *gradients = bwd_before_da(
            dy, self.weight, self.lora_A, self.lora_B, kept, self.scaling, self.gate, needs[:4],
            self.backend,
        )  # fmt: skip
        if v is None:
            return [None, None]
        return [dx, v, None, None, *gradients, self._bias_gradient(dy, needs)]

    def _bias_gradient(self, dy: Tensor, needs: Sequence[bool]) -> Tensor | None:
        return dy.sum(0, dtype=torch.float32).to(self.weight.dtype) if needs[4] else None

    def reads_x(self, needs: Sequence[bool]) -> bool:
        """Whether the backward pass reads x, if it has to give these gradients."""
        return keeps_x(self.backend, needs[1], needs[3])


class _Plan(NamedTuple):
    """All of a call that is no tensor of a layer. The outer layer comes last."""

    activation: str
    rest: tuple[tuple[float, str, bool], ...]  # scaling, backend, native, of each layer
    remade: Remade | None

    def layers(self, tensors: Sequence[Any]) -> list[_Layer]:
        """The layers, whose tensors come one after the other in ``tensors``."""
        each = zip(*[iter(tensors)] * _TENSORS, strict=True)
        return [
            _Layer._make((*of_layer, *rest)) for of_layer, rest in zip(each, self.rest, strict=True)
        ]


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: _Plan, *tensors: Tensor | None) -> Tensor:
        *inner, outer = plan.layers(tensors)
        rows = x.reshape(-1, x.shape[-1])
        outputs, kept = zip(*(layer.forward(rows) for layer in inner), strict=True)
        e, g = _halves(outputs)
        h = gated_product(e, g, plan.activation)
        y, kept_outer = outer.forward(h)
        sources: Sequence[Tensor | None] = (None,)
        again = None
        if any(layer.reads_x(layer.trained()) for layer in inner):
            sources = (x,)
            if plan.remade is not None:
                sources, again = plan.remade.sources, plan.remade.again
                again.add_reader()
        ctx.save_for_backward(*tensors, *outputs, *kept, kept_outer, *sources)
        ctx.plan, ctx.again = plan._replace(remade=None), again
        return y.view(*x.shape[:-1], y.shape[1])

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor | None, ...]:
        plan, count = ctx.plan, len(ctx.plan.rest)
        saved = iter(ctx.saved_tensors)
        tensors = [next(saved) for _ in range(_TENSORS * count)]
        outputs = [next(saved) for _ in range(count - 1)]
        kept = [next(saved) for _ in range(count)]
        sources = tuple(saved)
        x = sources[0] if ctx.again is None else ctx.again(*sources)
        need_x, _, *rest = ctx.needs_input_grad
        if torch.is_grad_enabled():
            return _derivable(dy, x, plan, tensors, [need_x, *rest])
        *inner, outer = plan.layers(tensors)
        needs = [(True, *rest[i + 1 : i + _TENSORS]) for i in range(0, len(rest), _TENSORS)]
        leading, dy = dy.shape[:-1], dy.reshape(-1, dy.shape[-1])
        d_outputs, last = _outer_backward(outer, dy, outputs, kept.pop(), needs[-1], plan)
        rows = None if x is None else x.reshape(-1, inner[0].weight.shape[1])
        dx, gradients = None, []
        for layer, d_output, keep, need in zip(inner, d_outputs, kept, needs, strict=False):
            more, *of_layer = layer.backward(d_output, rows, keep, (need_x, *need[1:]))
            gradients += of_layer
            if need_x:
                dx = more if dx is None else dx.add_(more)
        dx = None if dx is None else dx.view(*leading, dx.shape[1])
        return dx, None, *gradients, *last


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
        dh, v, *gradients = layer.backward_before_da(dy, kept, needs)
    if v is None:
        h = gated_product(e, g, plan.activation) if layer.reads_x(needs) else None
        dh, *gradients = layer.backward(dy, h, kept, needs)
        del h
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
        gradients[1] = da.to(layer.lora_A.dtype)
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
    dy: Tensor, x: Tensor | None, plan: _Plan, tensors: Sequence[Any], needed: Sequence[bool]
) -> tuple[Tensor | None, ...]:
    """The gradients by PyTorch's own operations, for derivatives of these in turn."""
    if x is None:
        given = "a second derivative where no lora_A of the inner layers is trained"
        raise BackendUnavailableError("gated_mlp", given, "a model without lean blocks")
    leaves: list[Any] = [t if t is None else t.view_as(t) for t in (x, *tensors)]
    each = zip(*[iter(leaves[1:])] * _TENSORS, strict=True)
    scalings = (scaling for scaling, *_ in plan.rest)
    *inner, outer = (LowRankLinear._make((*q, s)) for q, s in zip(each, scalings, strict=True))
    y = gated_mlp_ref(leaves[0], inner, outer, plan.activation)
    wanted = [need and t is not None for need, t in zip(needed, leaves, strict=True)]
    inputs = [t for t, want in zip(leaves, wanted, strict=True) if want]
    found = iter(torch.autograd.grad(y, inputs, dy, create_graph=True))
    dx, *gradients = (next(found) if want else None for want in wanted)
    return dx, None, *gradients


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
    check_matrix("outer.weight", outer.weight)
    if outer.weight.shape[1] != width // 2:
        given = "x".join(map(str, outer.weight.shape))
        raise ArgumentError("outer", f"a weight of {given}", f"{width // 2} columns")
    _check(x.new_empty((0, width // 2)), outer)
    layers = (*inner, outer)
    paths = [
        path_of(x, layer.weight, layer.lora_A, backend, False)
        for layer, backend in zip(layers, backends[-len(layers) :], strict=True)
    ]
    if any(backend == "reference" for backend, _ in paths):
        return gated_mlp_ref(x, inner, outer, activation)
    plan = _Plan(
        activation,
        tuple((layer.scaling, *path) for layer, path in zip(layers, paths, strict=True)),
        remade_of(x),
    )
    return _GatedMlp.apply(x, plan, *(t for layer in layers for t in _tensors(layer)))


def _cast(layer: LowRankLinear, dtype: torch.dtype) -> LowRankLinear:
    """The layer as autocast multiplies by it: W and the bias in ``dtype``."""
    bias = None if layer.bias is None else layer.bias.to(dtype)
    return layer._replace(weight=layer.weight.detach().to(dtype), bias=bias)


def _tensors(layer: LowRankLinear) -> tuple[Tensor | None, ...]:
    weight = layer.weight.detach()
    return weight, layer.lora_A, layer.lora_B, layer.gate, layer.bias


def _check(x: Tensor, layer: LowRankLinear) -> None:
    check_lora_linear(
        x, layer.weight, layer.lora_A, layer.lora_B, layer.scaling, layer.gate, layer.bias
    )
