"""Forward-mode and second derivatives of `lora_linear`: right, or refused in clear words."""

from collections.abc import Callable, Iterator

import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor

from ...errors import ArgumentError
from ...ops import reference
from ...ops.lora_linear import lora_linear
from ..tolerance import GRADIENT, NO_MEASURE, Case, Row
from .compare import compare
from .draws import Draw
from .lora_linear import Call, draw_call, numbers_of

FACTORS = ("x", "lora_A", "lora_B")
DRAWS = 3  # of numbers, for eager PyTorch says nothing where all terms of a derivative cancel
Function = Callable[[dict[str, Tensor]], Tensor]
Derivative = Callable[[Function, dict[str, Tensor]], list]


def derivative_rows(case: Case, draw: Draw, path: str, dtypes: tuple) -> Iterator[Row]:
    """The rows of one case, which takes no notice of how the inputs lie in memory."""
    call = draw_call(draw, path, dtypes, case.device)
    case.shape += f" {call}"
    for name, derivative in DERIVATIVES.items():
        for _ in range(DRAWS):
            row = _compared(case, name, derivative, call, numbers_of(case, call, dtypes))
            if row.note != NO_MEASURE:
                break
        yield row


def _compared(
    case: Case, name: str, derivative: Derivative, call: Call, values: dict[str, Tensor]
) -> Row:
    """The row of one derivative at these numbers."""
    options = {"scaling": call.scaling, "dropout": call.dropout, "seed": 3}

    def function(of: Callable, **more) -> Function:
        return lambda inputs: of(**inputs, **options, **more)

    doubles = {name: t.double() for name, t in values.items()}
    eager = function(reference.lora_linear_ref)
    try:
        ours = derivative(function(lora_linear, backend=call.asked), values)
    except Exception as error:
        return Row(**case.names, output=name, ok=_is_clear(error), note=_in_words(error))
    if any(t is None for t in ours):
        return Row(**case.names, output=name, ok=False, note="silently no derivative")
    expected = [derivative(eager, inputs) for inputs in (values, doubles)]
    return compare(case, name, ours, *expected, factor=GRADIENT)


def _without_dy(values: dict[str, Tensor]) -> tuple[dict[str, Tensor], Tensor]:
    inputs = dict(values)
    return inputs, inputs.pop("dy")


def _transformed(function: Function, values: dict[str, Tensor]) -> list[Tensor]:
    """The derivative of y along the values themselves, by `torch.func.jvp`."""
    inputs, _ = _without_dy(values)
    along = tuple(inputs[name] for name in FACTORS)

    def of(*factors: Tensor) -> Tensor:
        return function({**inputs, **dict(zip(FACTORS, factors, strict=True))})

    return [torch.func.jvp(of, along, along)[1]]


def _dual(function: Function, values: dict[str, Tensor]) -> list[Tensor | None]:
    """The same, by dual numbers."""
    inputs, _ = _without_dy(values)
    with forward_ad.dual_level():
        dual = {name: forward_ad.make_dual(inputs[name], inputs[name]) for name in FACTORS}
        return [forward_ad.unpack_dual(function({**inputs, **dual})).tangent]


def _second(function: Function, values: dict[str, Tensor]) -> list[Tensor | None]:
    """The gradients of the squared norm of dx."""
    inputs, dy = _without_dy({name: t.detach().clone() for name, t in values.items()})
    for name in FACTORS:
        inputs[name].requires_grad_()
    (dx,) = torch.autograd.grad(
        function(inputs), inputs["x"], dy.requires_grad_(), create_graph=True
    )
    dx.square().sum().backward()
    return [inputs["lora_A"].grad, inputs["lora_B"].grad, dy.grad]


DERIVATIVES = {"func.jvp": _transformed, "dual numbers": _dual, "double backward": _second}


def _is_clear(error: Exception) -> bool:
    """Whether an error is one of deltadiff's own, or names what cannot be differentiated."""
    words = ("lora_linear", "deltadiff", "differentiate twice")
    return isinstance(error, ArgumentError) or any(word in str(error) for word in words)


def _in_words(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split()):.200}"
