"""PEFT's LoRA layers as `LoraLinear`: the layer trains PEFT's own parameters."""

from typing import TYPE_CHECKING

from ..checks import check_dropout
from ..errors import ArgumentError, ArgumentTypeError
from .base_format import check_backend
from .lora_linear import LoraLinear
from .targets import is_linear

if TYPE_CHECKING:
    from .linear import PeftLayer


def from_peft(name: str, module: "PeftLayer", backend: str | None) -> LoraLinear:
    """The layer that stands for PEFT's ``module``, with its pair, scaling and dropout.

    Raises:
        ArgumentTypeError, ArgumentError: a layer that is merged, disabled, has several active
            adapters or does more than plain LoRA on an ``nn.Linear`` or a `Conv1D`.
        BackendUnavailableError: ``backend`` cannot run this layer.
    """
    adapters = list(module.active_adapters)
    if len(adapters) != 1 or module.merged or module.disable_adapters:
        state = f"PEFT layer with active adapters {adapters}, merged={module.merged}"
        raise ArgumentError(name, state, "one active adapter, not merged")
    (adapter,) = adapters
    base_layer = module.get_base_layer()
    dropout = getattr(module.lora_dropout[adapter], "p", 0.0)
    check_dropout(f"lora_dropout of {name}", dropout)
    if not is_linear(base_layer) or getattr(module, "use_dora", {}).get(adapter, False):
        given = f"PEFT layer around {type(base_layer).__name__}"
        raise ArgumentTypeError(name, given, "plain LoRA on nn.Linear or Conv1D")
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    check_backend(base_layer, a.weight.shape[0], dropout, backend)
    if b.bias is not None:
        raise ArgumentTypeError(name, "a PEFT layer with lora_bias", "lora_bias=False")
    layer = LoraLinear(
        module, base_layer, a.weight, b.weight, module.lora_alpha[adapter],
        module.scaling[adapter], dropout, backend,
    )  # fmt: skip
    layer.lora_A, layer.lora_B = a.weight, b.weight  # the same parameters, so PEFT sees training
    return layer.train(module.training)
