"""What each call of PEFT does to a swapped and trained model: right, an error, or a warning.

`CALLS` makes them; each says which outputs it promises (see `trained_peft`).
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
from torch import Tensor
from trained_peft import CONFIG, Trained, base_model

from deltadiff import export_peft, swap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.delta_state import LostUpdateWarning


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
