"""PEFT's LoRA layers, swapped: what they keep, and which are refused."""

import pytest
import torch
from two_blocks import peft_model

from deltadiff import swap_, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError


def test_peft_layers_keep_their_pair_and_scaling():
    model = peft_model(modules_to_save=["head"])
    x = torch.randn(4, 8)
    y = model(x)
    y.sum().backward()
    grads = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    pair = model.base_model.model.layers[0].q_proj.lora_A["default"].weight
    report = swap_(model)
    layer = model.base_model.model.layers[0].q_proj
    assert len(report.rows) == 4 and layer.lora_A is pair and layer.scaling == 3.0 and layer.r == 2
    torch.testing.assert_close(model(x), y)
    model.zero_grad()
    model(x).sum().backward()
    torch.testing.assert_close(
        layer.lora_A.grad, grads["base_model.model.layers.0.q_proj.lora_A.default.weight"]
    )
    saved = [n for n, p in model.named_parameters() if p.requires_grad and "lora" not in n]
    assert saved and all("modules_to_save" in n for n in saved)
    unswap_(model)
    torch.testing.assert_close(model(x), y)
    assert type(model.base_model.model.layers[0].q_proj).__module__.startswith("peft.")


def test_peft_layers_that_are_merged_or_more_than_lora_are_refused():
    model = peft_model()
    model.merge_adapter()
    with pytest.raises(ArgumentError, match="merged=True"):
        swap_(model)
    with pytest.raises(ArgumentTypeError, match="PEFT layer"):
        swap_(peft_model(use_dora=True))
