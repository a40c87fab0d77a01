"""The layers that can be swapped: ``nn.Linear``, transformers' `Conv1D`, PEFT's LoRA layers."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeGuard

from torch import Tensor, nn

from ..errors import ArgumentError, ArgumentTypeError

if TYPE_CHECKING:  # what deltadiff uses of the layers of packages that need not be installed

    class Conv1D(nn.Module):
        """transformers' `Conv1D`."""

        weight: Tensor
        bias: Tensor

    class PeftFactor(nn.Module):
        """The linear layer without bias in which PEFT keeps A or B."""

        weight: nn.Parameter
        bias: nn.Parameter | None

    class PeftLayer(nn.Module):
        """PEFT's ``lora.Linear``, whose mappings are from the name of an adapter."""

        out_features: int
        in_features: int
        active_adapters: Sequence[str]
        merged: bool
        disable_adapters: bool
        lora_A: Mapping[str, PeftFactor]
        lora_B: Mapping[str, PeftFactor]
        lora_alpha: Mapping[str, float]
        lora_dropout: Mapping[str, nn.Module]
        scaling: Mapping[str, float]

        def get_base_layer(self) -> nn.Module: ...

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
