"""`swap_` on a PEFT model: nothing but the forward pass changes; what cannot be faster is said."""

import pytest
import torch
from torch import nn
from two_blocks import Model, peft_model

from deltadiff import merge_, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentError, SwapError


def test_the_model_stays_pefts():
    import peft

    model = peft_model(modules_to_save=["head"])
    x = torch.randn(4, 8)
    y = model(x)
    before = dict(model.named_parameters())
    needed = {name: p.requires_grad for name, p in before.items()}
    keys = list(model.state_dict())
    report = swap_(model)
    assert len(report.rows) == 4 and "2 of PEFT" not in str(report)
    assert {n: id(p) for n, p in model.named_parameters()} == {n: id(p) for n, p in before.items()}
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needed
    assert list(model.state_dict()) == keys
    layer = model.base_model.model.layers[0].q_proj
    assert isinstance(layer, peft.tuners.lora.Linear)
    torch.testing.assert_close(model(x), y)
    unswap_(model)
    assert type(layer) is peft.tuners.lora.Linear and "deltas" not in vars(layer)
    torch.testing.assert_close(model(x), y)


@pytest.mark.parametrize(
    "option",
    [{"r": 4}, {"lora_alpha": 2}, {"use_rslora": True}, {"modules_to_save": ["head"]}, {"seed": 0}],
)
def test_what_pefts_configuration_settles_is_refused(option):
    with pytest.raises(ArgumentError, match=f"{next(iter(option))}.*PEFT's configuration"):
        swap_(model := peft_model(), **option)
    assert type(model.base_model.model.layers[0].q_proj).__name__ == "Linear"


def test_targets_choose_which_layers_become_faster():
    model = peft_model()
    report = swap_(model, target_modules=["q_proj"])
    assert [row.module.rpartition(".")[2] for row in report.rows] == ["q_proj", "q_proj"]
    assert "2 of PEFT's layers run its own forward pass: `swap_` was not called since" in str(
        report
    )
    assert all(p.requires_grad for n, p in model.named_parameters() if "lora_" in n)
    with pytest.raises(ArgumentError, match="head, which PEFT does not adapt"):
        swap_(model, target_modules=["head"])


def test_a_layer_added_after_the_swap_is_said_and_taken_by_the_next_swap():
    import peft

    model = peft_model()
    swap_(model)
    model.add_adapter("more", peft.LoraConfig(r=2, target_modules=["q_proj", "head"]))
    assert "1 of PEFT's layers run its own forward pass" in str(swap_report(model))
    assert "own forward pass" not in str(swap_(model))


@pytest.mark.parametrize("config", ["IA3Config", "LoHaConfig", "AdaLoraConfig"])
def test_a_model_without_lora_on_linear_layers_is_refused(config):
    import peft

    options = {"total_step": 10} if config == "AdaLoraConfig" else {}
    options |= {"feedforward_modules": []} if config == "IA3Config" else {}
    options = getattr(peft, config)(target_modules=["q_proj"], **options)
    model = peft.get_peft_model(Model(), options)
    needed = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = [type(m) for m in model.modules()]
    with pytest.raises(SwapError, match="without a layer to make faster"):
        swap_(model)
    assert {n: p.requires_grad for n, p in model.named_parameters()} == needed
    assert [type(m) for m in model.modules()] == kinds


def test_hooks_that_hold_the_forward_pass_ask_for_another_order():
    model = peft_model()
    layer = model.base_model.model.layers[0].q_proj
    layer.forward = layer.forward  # what accelerate's `add_hook_to_module` leaves
    report = swap_(model)
    assert "call `swap_` before they are put on" in str(report) and len(report.rows) == 3
    with pytest.raises(ArgumentError, match="before they are put on"):
        swap_(model, target_modules=["q_proj"])


def test_a_swap_that_makes_nothing_faster_warns():
    with pytest.warns(UserWarning, match="no layer of this model became faster.*DoraLinearVariant"):
        report = swap_(peft_model(use_dora=True))
    assert {row.path for row in report.rows} == {"peft"}
    model = peft_model()
    model.merge_adapter()
    with pytest.warns(UserWarning, match="its adapters are merged"):
        swap_(model)


def test_a_pair_that_the_model_does_not_use_is_said():
    import peft

    class Attending(nn.Module):
        def __init__(self):
            super().__init__()
            self.attention, self.q_proj = nn.MultiheadAttention(8, 2), nn.Linear(8, 8)

        def forward(self, x):
            return self.attention(self.q_proj(x), x, x)[0]

    config = peft.LoraConfig(target_modules=["out_proj", "q_proj"])
    report = swap_(peft.get_peft_model(Attending(), config))
    said = "MultiheadAttention reads its weight, past its forward pass (base_model.model.attention"
    assert f"1 of PEFT's layers may have no part in the model: {said}" in str(report)
    assert "own forward pass: " not in str(report)


def test_calls_for_our_own_layers_name_pefts():
    model = peft_model()
    swap_(model)
    with pytest.raises(SwapError, match="merge_and_unload"):
        merge_(model)
    with pytest.raises(SwapError, match="without swapped layers"):
        unswap_(nn.Sequential(nn.Linear(2, 2)))
