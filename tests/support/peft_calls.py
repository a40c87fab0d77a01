"""What each call of PEFT does to a swapped and trained model: right, an error, or a warning.

`CALLS` makes them. Each promises outputs, which are worked out in float64 from the formulas: with
W_0 the weight before training, the layers act as W_0 + s B A for LoRA, and for Delta-LoRA as
W_0 + s B A + lambda s (B A - B_k A_k).
"""

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory

import peft
import torch
from peft.utils.hotswap import hotswap_adapter
from peft_cases import shake
from peft_models import input_of, make_model, output_of
from torch import Tensor, nn

from deltadiff import DeltaLoRA, FusedAdamW, export_peft, swap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.peft.update_guards import LostUpdateWarning

METHODS = {"LoRA": None, "Delta-LoRA factored": "factored", "Delta-LoRA in place": "inplace"}
RATIO, TARGETS = 0.5, ["q_proj", "v_proj"]
CONFIG = {"r": 2, "lora_alpha": 6, "target_modules": TARGETS}
X = input_of("llama")


def base_model() -> nn.Module:
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


@dataclass(frozen=True)
class Call:
    """A call, with the outputs that it gives and those that it promises.

    Attributes:
        name: as the table has it.
        run: makes the call; yields pairs of outputs: found, promised.
        in_peft: whether it is a call of PEFT's model, else of transformers' own.
    """

    name: str
    run: Callable[[Trained], Iterator[tuple[Tensor, Tensor]]]
    in_peft: bool = True


def outcome(call: Call, method: str) -> str:
    """ "right", "raises" (nothing changed) or "warns" (of what is lost); else what is wrong."""
    with TemporaryDirectory() as folder, warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        world = Trained(method, call.in_peft, Path(folder))
        before = world.snapshot()
        try:
            right = all(_close(found, wanted) for found, wanted in call.run(world))
        except ArgumentError as error:
            assert "Delta-LoRA" in str(error) and error.accepted
            return "raises" if _same(before, world.snapshot()) else "raises, and changed something"
    lost = [str(w.message) for w in caught if issubclass(w.category, LostUpdateWarning)]
    assert all("export_peft(" in text or "optimizer.load_state_dict" in text for text in lost)
    if right:
        return "right, and warns for nothing" if lost else "right"
    return "warns" if lost else "wrong, and says nothing"


def _close(found: Tensor, wanted: Tensor) -> bool:
    limit = 1e-10 if wanted.dtype == torch.float64 else 1e-6  # the logits are of the size of 1
    return torch.allclose(found, wanted, rtol=limit, atol=limit)


def _same(before: dict, after: dict) -> bool:
    same = before["active"] == after["active"]
    same = same and before["trains"].items() <= after["trains"].items()
    kept = all(torch.equal(t, after["state"][n]) for n, t in before["state"].items())
    return same and kept and torch.equal(before["outputs"], after["outputs"])


# ------------------------------------------------------------------------- PEFT's own model


def _save_pretrained(t):
    t.model.save_pretrained(t.folder)
    yield t.found(peft.PeftModel.from_pretrained(base_model(), str(t.folder))), t.trained()


def _from_pretrained(t):
    export_peft(t.model, t.folder)
    again = peft.PeftModel.from_pretrained(base_model(), str(t.folder))
    swap_(again)
    yield t.found(again).float(), t.trained().float()  # the file holds float32


def _merge_and_unload(t):
    wanted = t.trained()
    yield t.found(t.model.merge_and_unload()), wanted


def _merge_and_unmerge(t):
    t.model.merge_adapter()
    yield t.found(), t.trained()
    t.model.unmerge_adapter()
    yield t.found(), t.trained()


def _unload(t):
    yield t.found(t.model.unload()), t.outputs()


def _disable_adapter(t):
    with t.model.disable_adapter():
        yield t.found(), t.outputs()
    yield t.found(), t.trained()


def _set_adapter(t):
    t.model.set_adapter("other")
    yield t.found(), t.outputs(other=1.0)
    t.model.set_adapter("default")
    yield t.found(), t.trained()


def _two_active(t):
    t.model.base_model.set_adapter(["default", "other"])
    yield t.found(), t.outputs(default=1.0, other=1.0)
    t.model.set_adapter("default")
    yield t.found(), t.trained()


def _scale(t):
    for layer in t.layers.values():
        layer.set_scale("default", 0.5)
    yield t.found(), t.outputs(default=1.0, scale=0.5)
    for layer in t.layers.values():
        layer.scale_layer(0.5)
    yield t.found(), t.outputs(default=1.0, scale=0.25)
    for layer in t.layers.values():
        layer.unscale_layer()
    yield t.found(), t.trained()


def _add_adapter(t):
    t.model.add_adapter("new", peft.LoraConfig(**CONFIG))
    yield t.found(), t.trained()


def _delete_another(t):
    t.model.delete_adapter("other")
    yield t.found(), t.trained()


def _delete_the_trained(t):
    t.model.delete_adapter("default")
    yield t.found(), t.outputs(other=1.0)


def _load_another(t):
    t.model.load_adapter(t.other_file, "new")
    yield t.found(), t.trained()


def _load_the_same(t):
    t.model.save_pretrained(t.folder)
    wanted = t.trained()
    t.train()
    t.model.load_adapter(str(t.folder), "default")
    yield t.found(), wanted


def _weighted(kind):
    def run(t):
        wanted = t.outputs(default=0.5, other=2.0)
        rank = {"svd_rank": 8} if kind == "svd" else {}
        t.model.add_weighted_adapter(["default", "other"], [0.5, 2.0], "sum", kind, **rank)
        t.model.set_adapter("sum")
        yield t.found(), wanted

    return run


def _hot_swap(t):
    wanted = t.outputs(other=1.0)
    hotswap_adapter(t.model, t.other_file, "default", torch_device="cpu")
    yield t.found(), wanted


def _state_dict(t):
    state = peft.get_peft_model_state_dict(t.model)
    again = peft.get_peft_model(base_model(), peft.LoraConfig(**CONFIG))
    peft.set_peft_model_state_dict(again, copy.deepcopy(state))
    yield t.found(again), t.trained()


# ------------------------------------------------------------- transformers, without PeftModel


def _own_add_adapter(t):
    t.model.add_adapter(peft.LoraConfig(**CONFIG), "new")  # which activates it; its B is 0
    yield t.found(), t.outputs()
    t.model.set_adapter("default")
    yield t.found(), t.trained()


def _own_disable_adapters(t):
    t.model.disable_adapters()
    yield t.found(), t.outputs()
    t.model.enable_adapters()
    yield t.found(), t.trained()


def _own_load_adapter(t):
    t.model.load_adapter(t.other_file, adapter_name="new")  # which activates it
    yield t.found(), t.outputs(other=1.0)
    t.model.set_adapter("default")
    yield t.found(), t.trained()


def _own_hot_swap(t):
    wanted = t.outputs(other=1.0)
    t.model.load_adapter(t.other_file, adapter_name="default", hotswap=True)
    yield t.found(), wanted


def _own_save_pretrained(t):
    t.model.save_pretrained(t.folder)
    again = base_model()
    again.load_adapter(str(t.folder))
    yield t.found(again), t.trained()


CALLS = [
    Call("`save_pretrained`", _save_pretrained),
    Call("`from_pretrained` of what `export_peft` wrote", _from_pretrained),
    Call("`merge_and_unload`", _merge_and_unload),
    Call("`merge_adapter` and `unmerge_adapter`", _merge_and_unmerge),
    Call("`unload`", _unload),
    Call("`disable_adapter`", _disable_adapter),
    Call("`set_adapter` to another", _set_adapter),
    Call("`set_adapter` of another beside it", _two_active),
    Call("`set_scale`, `scale_layer`, `unscale_layer`", _scale),
    Call("`add_adapter`", _add_adapter),
    Call("`delete_adapter` of another", _delete_another),
    Call("`delete_adapter` of the trained one", _delete_the_trained),
    Call("`load_adapter` as another", _load_another),
    Call("`load_adapter` over the trained one", _load_the_same),
    Call("`add_weighted_adapter`, svd", _weighted("svd")),
    Call("`add_weighted_adapter`, cat", _weighted("cat")),
    Call("hot-swapping over the trained one", _hot_swap),
    Call("`get_peft_model_state_dict`", _state_dict),
    Call("transformers' `add_adapter`", _own_add_adapter, in_peft=False),
    Call("transformers' `set_adapter` to another", _set_adapter, in_peft=False),
    Call("transformers' `disable_adapters`", _own_disable_adapters, in_peft=False),
    Call("transformers' `delete_adapter` of another", _delete_another, in_peft=False),
    Call("transformers' `delete_adapter` of the trained one", _delete_the_trained, in_peft=False),
    Call("transformers' `load_adapter` as another", _own_load_adapter, in_peft=False),
    Call("transformers' hot-swapping over the trained one", _own_hot_swap, in_peft=False),
    Call("transformers' `save_pretrained`", _own_save_pretrained, in_peft=False),
]
