"""Which modules compute what `gated_mlp` or `rms_norm` computes: by the source of their forward.

Models by transformers, and Liger's patches of them, write these forward passes in a few ways, each
in many classes. To know another one, add it to `GATED_MLPS` or `RMS_NORMS`. In a pattern, the input
is called x.
"""

import ast
import functools
import inspect
import textwrap
from collections.abc import Callable
from typing import Any, NamedTuple

from torch import nn


class GatedMlpForm(NamedTuple):
    """The names of the parts of a gated MLP.

    Attributes:
        inner: the layers of the gate and of the other factor, or one layer that computes both.
        outer: the layer behind their product.
        activation: the name of the submodule, or "=" and what it always is.
    """

    inner: tuple[str, ...]
    outer: str
    activation: str


class RmsNormForm(NamedTuple):
    """Where an RMSNorm keeps what it computes with.

    Attributes:
        eps: the name of the attribute.
        offset: what is added to the weight, or the name of the attribute.
        casting: "llama" or "gemma" (see `reference_blocks.rms_norm_ref`), or "." and the name of
            the attribute that says it.
    """

    eps: str
    offset: float | str
    casting: str


_SEPARATE = ("gate_proj", "up_proj")
_JOINT = ("gate_up_proj",)

GATED_MLPS = {
    "return self.down_proj(self.act_fn(self.gate_proj(x)) * self.up_proj(x))": GatedMlpForm(
        _SEPARATE, "down_proj", "act_fn"
    ),
    """
    up_states = self.gate_up_proj(x)
    gate, up_states = up_states.chunk(2, dim=-1)
    up_states = up_states * self.activation_fn(gate)
    return self.down_proj(up_states)
    """: GatedMlpForm(_JOINT, "down_proj", "activation_fn"),
    "return self.down_proj(_swiglu_dispatch(self.gate_proj(x), self.up_proj(x)))": GatedMlpForm(
        _SEPARATE, "down_proj", "=silu"
    ),
    "return self.down_proj(LigerSiLUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))": (
        GatedMlpForm(_SEPARATE, "down_proj", "=silu")
    ),
    "return self.down_proj(LigerGELUMulFunction.apply(self.gate_proj(x), self.up_proj(x)))": (
        GatedMlpForm(_SEPARATE, "down_proj", "=gelu_tanh")
    ),
    """
    up_states = self.gate_up_proj(x)
    gate, up_states = up_states.chunk(2, dim=-1)
    return self.down_proj(_swiglu_dispatch(gate, up_states))
    """: GatedMlpForm(_JOINT, "down_proj", "=silu"),
}

RMS_NORMS = {
    """
    input_dtype = x.dtype
    x = x.to(torch.float32)
    variance = x.pow(2).mean(-1, keepdim=True)
    x = x * torch.rsqrt(variance + self.variance_epsilon)
    return self.weight * x.to(input_dtype)
    """: RmsNormForm("variance_epsilon", 0.0, "llama"),
    """
    output = self._norm(x.float())
    output = output * (1.0 + self.weight.float())
    return output.type_as(x)
    """: RmsNormForm("eps", 1.0, "gemma"),
    """
    return LigerRMSNormFunction.apply(
        x, self.weight, self.variance_epsilon, self.offset, self.casting_mode, self.in_place,
        self.row_mode,
    )
    """: RmsNormForm("variance_epsilon", "offset", ".casting_mode"),
}
_NORM = "return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps)"  # Gemma's `_norm`

# By the name of the class: what an activation module computes.
_ACTIVATIONS = {
    "SiLU": "silu",
    "SiLUActivation": "silu",
    "GELUTanh": "gelu_tanh",
    "PytorchGELUTanh": "gelu_tanh",
    "NewGELUActivation": "gelu_tanh",
    "GELUActivation": "gelu",
}


def gated_mlp_form(module: nn.Module) -> GatedMlpForm | None:
    """The parts of a module that is a gated MLP; None for any other."""
    return _known(GATED_MLPS).get(_body_of(forward_of(module)))


def rms_norm_form(module: nn.Module) -> RmsNormForm | None:
    """What a module that is an RMSNorm computes with; None for any other."""
    form = _known(RMS_NORMS).get(_body_of(forward_of(module)))
    if form is not None and form.eps == "eps":  # Gemma's, whose formula is in a method of its own
        (normalises,) = _known({_NORM: None})
        if _body_of(getattr(type(module), "_norm", None)) != normalises:
            return None
    return form


def activation_of(module: nn.Module, form: GatedMlpForm) -> str | None:
    """The activation of a gated MLP, as `gated_mlp` names it; None if that does not have it."""
    if form.activation.startswith("="):
        return form.activation[1:]
    found = getattr(module, form.activation, None)
    kind = type(found)
    if isinstance(found, nn.GELU) and kind is nn.GELU:
        return "gelu_tanh" if found.approximate == "tanh" else "gelu"
    if not kind.__module__.startswith(("torch.nn.", "transformers.")):
        return None
    return _ACTIVATIONS.get(kind.__name__)


def forward_of(module: nn.Module) -> Callable[..., Any] | None:
    """The function that is the forward pass, of the class or the instance; None if it is none."""
    forward = vars(module).get("forward", type(module).forward)
    forward = getattr(forward, "__func__", forward)
    return forward if inspect.isfunction(forward) else None


@functools.cache
def _body_of(function: Callable[..., Any] | None) -> str | None:
    """The body of a function of (self, x), in a form that does not depend on how it is written."""
    if function is None or hasattr(function, "__wrapped__"):
        return None
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function))).body[0]
    except (OSError, TypeError, SyntaxError, IndexError):
        return None
    if not isinstance(tree, ast.FunctionDef) or tree.decorator_list or len(tree.args.args) != 2:
        return None
    return _normalised(tree.body, tree.args.args[1].arg)


@functools.cache
def _bodies(patterns: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(_normalised(ast.parse(textwrap.dedent(text)).body, "x") for text in patterns)


def _known(forms: dict[str, Any]) -> dict[str | None, Any]:
    return dict(zip(_bodies(tuple(forms)), forms.values(), strict=True))


def _normalised(body: list[ast.stmt], x: str) -> str:
    """The statements without docstrings, with ``x`` called x, and without a name for the result."""
    body = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
    for node in (node for statement in body for node in ast.walk(statement)):
        if isinstance(node, ast.Name) and node.id == x:
            node.id = "x"
    match body:
        case [*first, ast.Assign([ast.Name(name)], value), ast.Return(ast.Name(returned))]:
            if name == returned:
                body = [*first, ast.Return(value)]
    return "\n".join(ast.dump(statement) for statement in body)
