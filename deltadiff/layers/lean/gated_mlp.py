"""`LeanGatedMlp`: a gated MLP that makes the input of its last layer again in the backward pass."""

from typing import Any

from torch import Tensor, nn

from ...ops.gated_mlp import gated_mlp
from ...ops.lora_linear import autocast_dtype
from ..lora_layers import HoldsPairs
from .known_forwards import activation_of, gated_mlp_form
from .lean_forward import LeanForward


class LeanGatedMlp(LeanForward):
    """down(act(gate(x)) * up(x)) by `gated_mlp`, for a module whose three layers are swapped."""

    what = "gated MLP"

    def __init__(self, module: nn.Module):
        form = gated_mlp_form(module)
        assert form is not None  # `why_not_lean` has asked
        super().__init__(module)
        self.form = form

    def layers(self) -> list[Any]:
        """The inner layers, then the outer one."""
        return [getattr(self.module, name) for name in (*self.form.inner, self.form.outer)]

    def parts(self) -> list[nn.Module]:
        name = self.form.activation
        return self.layers() + ([] if name.startswith("=") else [getattr(self.module, name)])

    def why_changed(self) -> str | None:
        layers = self.layers()
        held = [isinstance(layer, HoldsPairs) for layer in layers]
        if any(held) and not all(held):
            kind = type(layers[held.index(False)]).__name__
            return f"a {kind} stands in the place of one of its layers"
        if activation_of(self.module, self.form) is None:
            return "its activation is another one"
        return super().why_changed()

    def run_lean(self, x: Tensor) -> Tensor | None:
        *inner, outer = layers = self.layers()
        if not all(isinstance(layer, HoldsPairs) for layer in layers):
            return None  # all of them were taken out
        activation = activation_of(self.module, self.form)
        compute = autocast_dtype(x) or x.dtype
        h = x.new_empty((0, outer.in_features), dtype=compute)  # what will come to the outer layer
        inputs = (*[x] * len(inner), h)
        calls = [q.as_lora_linear(given) for q, given in zip(layers, inputs, strict=True)]
        if activation is None or any(call is None for call in calls):
            return None
        backends = [layer.backend for layer in layers]
        return gated_mlp(x, calls[:-1], calls[-1], activation, backends)


def why_not_lean(module: nn.Module) -> str | None:
    """None for a gated MLP that can be made lean, else the reason in words."""
    form = gated_mlp_form(module)
    if form is None:
        return "its forward pass is not one of those that are known"
    if activation_of(module, form) is None:
        return f"its activation is {type(getattr(module, form.activation)).__name__}"
    names = (*form.inner, form.outer)
    bare = [name for name in names if not isinstance(getattr(module, name), HoldsPairs)]
    return f"{' and '.join(bare)}: not swapped" if bare else None


def looks_gated(module: nn.Module) -> bool:
    """Whether a module is a gated MLP with a swapped layer, going by the names of its layers."""
    children = dict(module.named_children())
    inner = {"gate_proj", "up_proj"} <= children.keys() or "gate_up_proj" in children
    named = inner and "down_proj" in children
    return named and any(isinstance(child, HoldsPairs) for child in children.values())
