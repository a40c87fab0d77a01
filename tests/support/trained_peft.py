"""A model of PEFT, swapped and trained, and the outputs that PEFT's calls promise of it.

They are worked out in float64 from the formulas: with W_0 the weight before training, the layers
act as W_0 + s B A for LoRA, and for Delta-LoRA as W_0 + s B A + lambda s (B A - B_k A_k).
"""

import warnings
from pathlib import Path

import peft
import torch
from peft_cases import shake
from peft_models import input_of, make_model, output_of
from torch import Tensor, nn

from deltadiff import DeltaLoRA, FusedAdamW, swap_
from deltadiff.layers.delta_state import LostUpdateWarning

METHODS = {"LoRA": None, "Delta-LoRA factored": "factored", "Delta-LoRA in place": "inplace"}
RATIO, TARGETS = 0.5, ["q_proj", "v_proj"]
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS}
X = input_of("llama")


def base_model() -> nn.Module:
    """The base model, always with the same weights, in float64 and evaluation mode."""
    return make_model("llama").double().eval()


class Trained:
    """A swapped model with the adapters "default", which was trained, and "other".

    Attributes:
        model: PEFT's model, or a model of transformers with PEFT's layers.
        layers: PEFT's layers by the name of the plain base's layer.
        before: W of these before training.
        folder: an empty one.
        other_file: the folder in which "other" was saved.
    """

    def __init__(self, method: str, in_peft: bool, folder: Path):
        self.folder, self.w_update = folder / "empty", METHODS[method]
        self.model = base_model()
        if in_peft:
            self.model = peft.get_peft_model(self.model, peft.LoraConfig(**CONFIG))
        else:
            self.model.add_adapter(peft.LoraConfig(**CONFIG), "default")
        self.model.add_adapter(*self._arguments(in_peft, "other", peft.LoraConfig(**CONFIG)))
        self.model.set_adapter("default")
        kinds = {n: m for n, m in self.model.named_modules() if hasattr(m, "lora_A")}
        self.layers = {n.removeprefix("base_model.model."): m for n, m in kinds.items()}
        for layer in self.layers.values():
            shake(layer.lora_A), shake(layer.lora_B, 2)
        self.other_file = self._save_other(in_peft)
        swap_(self.model)
        weights = {n: m.get_base_layer().weight for n, m in self.layers.items()}
        self.before = {n: w.detach().clone() for n, w in weights.items()}
        if self.w_update is None:
            self.optimizer = FusedAdamW(self.model, lr=1e-2)
        else:
            self.optimizer = DeltaLoRA(
                self.model, lr=1e-2, update_ratio=RATIO, w_update=self.w_update
            )
        self.train()

    def _save_other(self, in_peft: bool) -> str:
        file = self.folder.parent / "other"
        if in_peft:
            self.model.save_pretrained(file.parent, selected_adapters=["other"])
        else:
            self.model.set_adapter("other")
            self.model.save_pretrained(file)
            self.model.set_adapter("default")
        return str(file)

    @staticmethod
    def _arguments(in_peft: bool, name: str, config: peft.LoraConfig) -> tuple:
        return (name, config) if in_peft else (config, name)

    def train(self) -> None:
        for _ in range(3):
            self.optimizer.zero_grad()
            output_of(self.model, X).square().mean().backward()
            self.optimizer.step()

    # --------------------------------------------------------------------- what is right

    def outputs(self, scale: float = 1.0, **weights: float) -> Tensor:
        """The outputs with these adapters, each times a number; of the base without any.

        ``scale`` is a factor on A and B alone, as PEFT's ``set_scale`` gives it.
        """
        model = base_model()
        with torch.no_grad():
            for name, layer in self.layers.items():
                w = model.get_submodule(name).weight
                w.copy_(self.before[name])
                for adapter, factor in weights.items():
                    w += factor * self._added(layer, adapter, scale)
            return output_of(model, X)

    def _added(self, layer: nn.Module, adapter: str, scale: float) -> Tensor:
        a, b = layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
        s, added = CONFIG["lora_alpha"] / CONFIG["r"], scale * (b @ a)
        if adapter == "default" and self.w_update is not None:
            delta = layer.deltas["default"]
            added = added + RATIO * (b @ a - delta.anchor_B @ delta.anchor_A)
        return s * added

    def trained(self) -> Tensor:
        return self.outputs(default=1.0)

    # ------------------------------------------------------------------- what is looked at

    def found(self, model: nn.Module | None = None) -> Tensor:
        with torch.no_grad():
            return output_of((model or self.model).eval(), X)

    def snapshot(self) -> dict[str, object]:
        """All that an error must leave as it is."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", LostUpdateWarning)
            state = {n: t.clone() for n, t in self.model.state_dict().items()}
        active = {n: list(layer.active_adapters) for n, layer in self.layers.items()}
        trains = {n: p.requires_grad for n, p in self.model.named_parameters()}
        return {"state": state, "active": active, "trains": trains, "outputs": self.found()}
