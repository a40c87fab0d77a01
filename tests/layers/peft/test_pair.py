"""`PeftPair` shows one adapter of a layer of PEFT, as it is at each look."""

import peft
import pytest
import torch
from peft_cases import lora
from peft_models import input_of, output_of
from peft_tuners import LIN0
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import ArgumentError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.peft.pair import PeftPair


def swapped(kind="mlp", **options):
    model = lora(kind, **options).build()
    swap_(model)
    return model


def test_what_it_shows():
    model = swapped("conv1d stack", use_rslora=True)
    layer = model.base_model.model.wide
    pair = lora_layers(model)["base_model.model.wide"]
    assert (pair.out_features, pair.in_features, pair.r, pair.lora_alpha) == (6, 8, 2, 6)
    assert pair.scaling == 6 / 2**0.5 and pair.lora_dropout == 0 and pair.transposed
    assert pair.weight is layer.base_layer.weight and pair.matrix.shape == (6, 8)
    assert pair.lora_A is layer.lora_A["default"].weight
    assert pair.adapter == [pair.lora_A, pair.lora_B] and pair.holder is layer.base_layer
    assert pair.active and pair.swapped_in and pair.in_peft
    assert pair.dispatch.backend == "reference" and pair.why_no_update() is None


def test_it_is_read_anew_and_equal_to_another_look():
    model = swapped()
    layer = model.base_model.model.lin0
    pair, again = (lora_layers(model)["base_model.model.lin0"] for _ in range(2))
    assert pair == again and hash(pair) == hash(again) and pair != PeftPair(layer, "other")
    layer.lora_B["default"].weight = nn.Parameter(torch.zeros(12, 2, dtype=torch.float64))
    layer.set_scale("default", 0.5)
    layer.lora_dropout["default"] = nn.Dropout(0.25)
    assert pair.lora_B is layer.lora_B["default"].weight
    assert pair.scaling == 1.5 and pair.lora_dropout == 0.25
    model.base_model.disable_adapter_layers()
    assert "its adapters are disabled" in pair.dispatch.reason
    model.delete_adapter("default")
    assert not pair.swapped_in and not pair.active


def test_each_adapter_has_a_pair_by_its_name():
    model = swapped()
    model.add_adapter("b", peft.LoraConfig(r=3, **LIN0))
    names = {n.removeprefix("base_model.model."): p for n, p in lora_layers(model).items()}
    assert {n: p.r for n, p in names.items()} == {"lin0[default]": 2, "lin0[b]": 3, "lin1": 2}
    assert [n for n, p in names.items() if p.active] == ["lin0[default]", "lin1"]


NO_UPDATE = {
    "a variant of LoRA: DoraLinearVariant": {"use_dora": True},
    "lora_dropout=0.1, which Delta-LoRA forbids": {"lora_dropout": 0.1},
}


@pytest.mark.filterwarnings("ignore:no layer of this model became faster")
@pytest.mark.parametrize("reason", NO_UPDATE)
def test_why_delta_lora_cannot_update_w(reason):
    model = swapped(**NO_UPDATE[reason])
    assert {pair.why_no_update() for pair in lora_layers(model).values()} == {reason}
    with pytest.raises(ArgumentError, match=reason):
        DeltaLoRA(model, update_ratio=0.5)
    optimizer = DeltaLoRA(model, update_ratio=0)
    output_of(model, input_of("mlp")).square().mean().backward()
    optimizer.step()
