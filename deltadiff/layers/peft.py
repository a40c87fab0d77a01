"""PEFT's LoRA layers as `LoraLinear`."""

from ..checks import DTYPES, check_dropout
from ..errors import ArgumentError, ArgumentTypeError
from ..ops.dispatch import choose_path
from .linear import linear_shape
from .lora_linear import LoraLinear
from .targets import _is_linear


def _from_peft(name, module, branch, backend, generator) -> LoraLinear:
    adapters = list(module.active_adapters)
    if len(adapters) != 1 or module.merged or module.disable_adapters:
        state = f"PEFT layer with active adapters {adapters}, merged={module.merged}"
        raise ArgumentError(name, state, "one active adapter, not merged")
    (adapter,) = adapters
    base, dropout = module.get_base_layer(), getattr(module.lora_dropout[adapter], "p", 0.0)
    check_dropout(f"lora_dropout of {name}", dropout)
    if not _is_linear(base) or getattr(module, "use_dora", {}).get(adapter, False):
        raise ArgumentTypeError(
            name, f"PEFT layer around {type(base).__name__}", "plain LoRA on nn.Linear or Conv1D"
        )
    a, b = module.lora_A[adapter], module.lora_B[adapter]
    if base.weight.dtype in DTYPES:
        layer = (*linear_shape(base), a.weight.shape[0])
        choose_path(base.weight.device, base.weight.dtype, backend, layer, dropout > 0)
    if b.bias is not None:
        raise ArgumentTypeError(name, "a PEFT layer with lora_bias", "lora_bias=False")
    layer = LoraLinear(
        module, base, a.weight, b.weight, module.lora_alpha[adapter], module.scaling[adapter],
        dropout, backend,
    )  # fmt: skip
    layer.lora_A, layer.lora_B = a.weight, b.weight  # the very parameters, so PEFT sees training
    return layer.train(module.training)
