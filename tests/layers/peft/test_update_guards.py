"""Where PEFT's calls meet an update of Delta-LoRA: raised before a change, or said in a warning.

benchmarks/peft_calls.py has the table of all calls; here are the ways around them.
"""

import warnings

import peft
import pytest
import torch
from peft_cases import lora, shake
from peft_checks import facts_of
from peft_models import input_of, make_model, output_of

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import SwapError
from deltadiff.layers.delta_state import LostUpdateWarning


def train(model, x, w_update, steps=3):
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    for _ in range(steps):
        optimizer.zero_grad()
        output_of(model, x).square().mean().backward()
        optimizer.step()
    return optimizer


def trained(kind="mlp", w_update="inplace", more=1):
    """A trained model with so many more adapters."""
    model = lora(kind).build()
    for i in range(more):
        targets = model.peft_config["default"].target_modules
        config = peft.LoraConfig(r=2, target_modules=targets, fan_in_fan_out=kind == "embedded")
        model.add_adapter(f"other{i}", config)
    swap_(model)
    x = input_of(kind)
    train(model, x, w_update)
    return model, x


CALLS = {
    "set_adapter": lambda m: m.set_adapter("other0"),
    "disable_adapter": lambda m: m.base_model.disable_adapter_layers(),
    "delete_adapter": lambda m: m.delete_adapter("default"),
    "unload": lambda m: m.unload(),
    "add_weighted_adapter": lambda m: m.add_weighted_adapter(["default"], [1.0], "sum"),
}


@pytest.mark.filterwarnings("ignore")  # of PEFT about fan_in_fan_out, and ours, which are not meant
@pytest.mark.parametrize("name", CALLS)
def test_a_layer_before_the_changed_ones_stays_as_it_is(name):
    """LoRA on an embedding comes first and has no update, but is not switched before the error."""
    model, x = trained("embedded")
    embedding = model.base_model.model.embed_tokens
    facts, y = facts_of(model), output_of(model, x)
    with pytest.raises(SwapError, match=rf"{name}.*adapter 'default'.*w_update='factored'"):
        CALLS[name](model)
    assert facts_of(model) == facts and list(model.peft_config) == ["default", "other0"]
    assert embedding.active_adapters == ["default"] and not embedding.disable_adapters
    assert torch.equal(output_of(model, x), y)


@pytest.mark.parametrize("name", ["set_adapter", "disable_adapter", "unload"])
def test_layers_of_a_part_guard_themselves(name):
    """Where `swap_` got a part of PEFT's model, PEFT's own class asks no layer beforehand."""
    model = lora().build()
    model.add_adapter("other0", peft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    swap_(model.base_model.model)
    train(model, input_of("mlp"), "inplace")
    assert type(model.base_model) is peft.tuners.lora.LoraModel
    y = output_of(model, input_of("mlp"))
    with pytest.raises(SwapError, match=name):
        CALLS[name](model)
    assert torch.equal(output_of(model, input_of("mlp")), y)


def test_what_keeps_the_update_in_use_is_allowed():
    model, x = trained(more=2)
    y = output_of(model, x).detach()
    model.set_adapter("default")
    model.delete_adapter("other1")
    model.base_model.set_adapter(["default", "other0"])  # whose B is 0
    torch.testing.assert_close(output_of(model, x), y)
    model.base_model.set_adapter(["other0", "default"])
    with pytest.raises(SwapError, match="set_adapter"):
        model.base_model.set_adapter(["other0"])
    model.delete_adapter("other0")
    torch.testing.assert_close(output_of(model, x), y)


def test_nothing_is_refused_before_the_first_update():
    model, x = trained()
    model = lora().build()
    model.add_adapter("other0", peft.LoraConfig(r=2, target_modules=["lin0", "lin1"]))
    swap_(model)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=9, w_update="inplace")
    output_of(model, x).square().mean().backward()
    optimizer.step()
    with model.disable_adapter():
        output_of(model, x)
    model.set_adapter("other0")
    model.unload()


@pytest.mark.parametrize("name", ["set_adapter", "disable_adapter", "delete_adapter", "unload"])
def test_a_mixed_model_asks_first_too(name):
    config = peft.LoraConfig(r=2, target_modules=["lin0"], init_lora_weights=False)
    model = peft.get_peft_model(make_model("mlp"), config, adapter_name="a", mixed=True)
    model.add_adapter("b", peft.LoHaConfig(r=2, target_modules=["lin1"]))
    model.set_adapter(["a", "b"])
    x = input_of("mlp")
    shake(model.double())
    swap_(model)
    train(model, x, "inplace")
    facts, y = facts_of(model), output_of(model, x)
    calls = {
        "set_adapter": lambda: model.set_adapter(["b"]),
        "disable_adapter": lambda: model.base_model.disable_adapter_layers(),
        "delete_adapter": lambda: model.delete_adapter(["b", "a"]),
        "unload": lambda: model.unload(),
    }
    with pytest.raises(SwapError, match=name):
        calls[name]()
    assert facts_of(model) == facts and torch.equal(output_of(model, x), y)
    model.add_adapter("c", config)
    model.delete_adapter(["b", "c"])


# ------------------------------------------------------------------------------- warnings


def lost(call) -> list[str]:
    """The words of each warning of a lost update."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        call()
    return [str(w.message) for w in caught if issubclass(w.category, LostUpdateWarning)]


@pytest.mark.parametrize("w_update", ["factored", "inplace"])
def test_saving_names_export_peft(w_update, tmp_path):
    model, _ = trained(w_update=w_update)
    for call in (
        lambda: model.save_pretrained(tmp_path),
        lambda: model.save_pretrained(tmp_path, state_dict=model.state_dict()),  # as accelerate
        lambda: peft.get_peft_model_state_dict(model),
    ):
        assert lost(call) and all("deltadiff.export_peft(model, folder)" in s for s in lost(call))


@pytest.mark.parametrize("w_update", ["factored", "inplace"])
def test_loading_another_adapter_warns_of_nothing(w_update, tmp_path):
    lora().build().save_pretrained(tmp_path)
    model, x = trained(w_update=w_update)
    y = output_of(model, x)
    assert lost(lambda: model.load_adapter(tmp_path, "new")) == []
    assert torch.equal(output_of(model, x), y)
    words = lost(lambda: model.load_adapter(tmp_path, "default"))
    where = "stays in W" if w_update == "inplace" else "was dropped"
    assert len(words) == 2 and all(where in s and "optimizer.load_state_dict" in s for s in words)


def test_plain_lora_warns_of_nothing(tmp_path):
    model = lora().build()
    swap_(model)
    train(model, input_of("mlp"), None, steps=0)
    assert lost(lambda: model.save_pretrained(tmp_path)) == []
    assert lost(lambda: model.load_adapter(tmp_path, "default")) == []
