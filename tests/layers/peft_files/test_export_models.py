"""`export_peft` of models whose layers are PEFT's own."""

import copy

import peft
import pytest
import torch
from small_models import build
from tolerance import assert_close_to_truth
from torch import nn
from two_blocks import Model, peft_model

from deltadiff import DeltaLoRA, export_peft, swap_
from deltadiff.errors import SwapError

X = torch.randn(5, 8, generator=torch.Generator().manual_seed(0))


def plain_base() -> nn.Module:
    """The model that `peft_model` puts PEFT's layers on."""
    torch.manual_seed(0)
    return Model()


def assert_exported(model: nn.Module, folder, rank: int):
    """PEFT computes with the adapter what the model does; returns the report."""
    report = export_peft(model, folder)
    read = peft.PeftModel.from_pretrained(plain_base(), folder)
    with torch.no_grad():
        truth = copy.deepcopy(model).double()(X.double())
        assert_close_to_truth(read(X), model(X), truth, 2)
        assert (plain_base()(X) - truth).norm() > 0.1 * truth.norm()
    assert set(report.ranks.values()) == {rank}
    return report


@pytest.mark.parametrize("options", [{}, {"w_update": "inplace"}, {"w_update": "factored"}])
def test_delta_lora_on_layers_of_peft(options, tmp_path):
    model = peft_model()
    swap_(model)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=1, **options)
    for _ in range(4):
        optimizer.zero_grad()
        model(X).square().mean().backward()
        optimizer.step()
    assert_exported(model, tmp_path, 4)


def test_several_active_adapters_are_added_up(tmp_path):
    model = peft_model()
    config = peft.LoraConfig(r=1, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model.add_adapter("more", config)
    model.base_model.set_adapter(["default", "more"])
    swap_(model)
    assert_exported(model, tmp_path, 3)
    model.set_adapter("more")
    assert_exported(model, tmp_path, 1)


@pytest.mark.parametrize("frozen", [False, True])
def test_copies_that_peft_made_are_saved(tmp_path, frozen):
    model = peft_model(modules_to_save=["head"])
    with torch.no_grad():
        model.base_model.model.head.modules_to_save["default"].weight.add_(1)
    model.requires_grad_(False)
    for name, p in model.named_parameters():
        p.requires_grad_("default" in name and not frozen)
    swap_(model)
    assert assert_exported(model, tmp_path, 2).modules_to_save == ("head",)


@pytest.mark.parametrize("option", ["use_dora", "lora_bias"])
def test_what_is_more_than_lora_is_refused(option, tmp_path):
    model = peft_model(**{option: True})
    with pytest.warns(UserWarning):  # no layer became faster
        swap_(model)
    with pytest.raises(SwapError, match="PEFT's own save_pretrained"):
        export_peft(model, tmp_path)


def test_layers_that_were_not_swapped_are_refused(tmp_path):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "embed_tokens"])
    model = peft.get_peft_model(build("llama"), config)
    swap_(model, target_modules=["q_proj"])
    with pytest.raises(SwapError, match=r"model\.embed_tokens: got PEFT's Embedding"):
        export_peft(model, tmp_path)
    with pytest.raises(SwapError, match="PEFT's Linear"):
        export_peft(peft_model(), tmp_path)
