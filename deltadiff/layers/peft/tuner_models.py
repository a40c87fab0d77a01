"""PEFT's models of tuners, with a question before each call that an update of W might not survive.

The classes have PEFT's names, for its ``get_model_status`` tells them. Layers outside of such a
model guard themselves, one by one.
"""

from collections.abc import Collection
from typing import Any

from peft.tuners import lora, mixed
from peft.tuners.tuners_utils import BaseTuner
from torch import nn

from ...errors import SwapError
from .fused_linear import Fused
from .update_guards import check_kept


class _AsksFirst(BaseTuner):
    """Calls of PEFT, which ask all layers before they change the first of them."""

    def _check_kept(self, call: str, in_use: Collection[str]) -> None:
        for layer in self.modules():
            if isinstance(layer, Fused):
                check_kept(call, layer.changed_weight(), in_use)

    def inject_adapter(self, *args: Any, **kwargs: Any) -> None:
        layers = [layer for layer in self.modules() if isinstance(layer, Fused)]
        for layer in layers:
            layer.keeps_active = True
        try:
            super().inject_adapter(*args, **kwargs)
        finally:
            for layer in layers:
                del layer.keeps_active

    def disable_adapter_layers(self) -> None:
        self._check_kept("disable_adapter", ())
        super().disable_adapter_layers()

    def set_adapter(self, adapter_name: str | list[str], inference_mode: bool = False) -> None:
        self._check_kept("set_adapter", _names(adapter_name))
        super().set_adapter(adapter_name, inference_mode)

    def delete_adapter(self, adapter_name: str | list[str]) -> None:
        self._check_kept("delete_adapter", self.peft_config.keys() - set(_names(adapter_name)))
        super().delete_adapter(adapter_name)

    def _check_merge_allowed(self) -> None:
        for layer in self.modules():
            if isinstance(layer, Fused):
                layer.check_mergeable(layer.active_adapters)
        super()._check_merge_allowed()

    def unload(self, *args: Any, **kwargs: Any) -> nn.Module:
        self._check_kept("unload", ())
        return super().unload(*args, **kwargs)


def _names(adapter_name: str | list[str]) -> list[str]:
    return [adapter_name] if isinstance(adapter_name, str) else adapter_name


class MixedModel(_AsksFirst, mixed.MixedModel):
    """PEFT's model of several kinds of tuners."""


class LoraModel(_AsksFirst, lora.LoraModel):
    """PEFT's model of LoRA."""

    def add_weighted_adapter(
        self, adapters: list[str], weights: list[float], adapter_name: str,
        combination_type: str = "svd", *args: Any, **kwargs: Any,
    ) -> None:  # fmt: skip
        """PEFT's. Only its combinations by SVD read what Delta-LoRA holds beside A and B."""
        self._check_kept("add_weighted_adapter", self.peft_config.keys() - set(adapters))
        for layer in self.modules():
            held = layer.deltas if isinstance(layer, Fused) else {}
            changed = [n for n in adapters if n in held and held[n].changes_model()]
            if changed and "svd" not in combination_type:
                given = f"{combination_type!r} of {changed[0]!r}, which Delta-LoRA trained"
                accepted = "a combination by svd, or adapters that `export_peft` wrote"
                raise SwapError("combination_type", given, accepted)
        super().add_weighted_adapter(
            adapters, weights, adapter_name, combination_type, *args, **kwargs
        )


# PEFT's classes, and what `fuse_` makes of them.
TUNER_MODELS: dict[type[nn.Module], type[nn.Module]] = {
    lora.LoraModel: LoraModel,
    mixed.MixedModel: MixedModel,
}
