"""The layers that can be swapped: ``nn.Linear``, transformers' `Conv1D`, PEFT's LoRA layers."""

from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:  # what deltadiff uses of the layers of packages that need not be installed

    class Conv1D(nn.Module):
        """transformers' `Conv1D`."""

        weight: Tensor
        bias: Tensor

    class PeftLayer(nn.Module):
        """PEFT's ``lora.Linear``."""

        out_features: int
        in_features: int

    LinearLayer = nn.Linear | Conv1D


def is_conv1d(module: nn.Module) -> TypeGuard["Conv1D"]:
    """Whether this is transformers' `Conv1D`: GPT-2's linear layer, its weight stored (in, out)."""
    kind = type(module)
    return kind.__name__ == "Conv1D" and kind.__module__.startswith("transformers.")


def is_peft(module: nn.Module) -> TypeGuard["PeftLayer"]:
    """Whether this is one of PEFT's LoRA layers."""
    lora = any(kind.__module__.startswith("peft.tuners.lora") for kind in type(module).__mro__)
    return lora and hasattr(module, "base_layer")


def is_peft_model(model: nn.Module) -> bool:
    """Whether a model holds layers or wrappers of PEFT, also layers that `swap_` made faster."""
    ours = f"{__package__}.peft."
    return any(type(m).__module__.startswith(("peft.", ours)) for m in model.modules())


def refuse_peft(method: str, model: nn.Module) -> None:
    """Raise ArgumentTypeError for a PEFT model, whose ranks and gates PEFT's configuration settles.

    Args:
        method: the name of the method that cannot train such a model.
    """
    if is_peft_model(model):
        given = f"a model with PEFT's layers, which {method} cannot train"
        accepted = "the base model: `swap_` that, and `deltadiff.export_peft` the result"
        raise ArgumentTypeError("model", given, accepted)


def linear_shape(module: nn.Module) -> tuple[int, int]:
    """(out, in) of an ``nn.Linear``, a `Conv1D` or a layer of PEFT."""
    if is_conv1d(module):
        return module.weight.shape[1], module.weight.shape[0]
    assert isinstance(module, nn.Linear) or is_peft(module)
    return module.out_features, module.in_features


def check_rank(argument: str, rank: int, name: str, module: nn.Module) -> None:
    """Raise ArgumentError unless the linear layer called ``name`` can have a pair of this rank."""
    n, k = linear_shape(module)
    if not 1 <= rank <= min(n, k):
        accepted = f"1 to {min(n, k)}, the smaller side of {name} {n} x {k}"
        raise ArgumentError(argument, rank, accepted)
