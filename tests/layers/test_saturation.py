"""A float16 weight that reaches the end of its range stays there, and the user is told once."""

import warnings

import pytest
import torch
from torch import nn

from deltadiff import DeltaLoRA, merge_, save_adapter, swap_

MESSAGE = "past the range of float16"


def trained(dtype=torch.float16, size=65000.0):
    """A layer whose updates are about +-1000 in each step."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).to(dtype)
    nn.init.constant_(model[0].weight, size)
    swap_(model, r=1, lora_alpha=1)
    nn.init.ones_(model[0].lora_B)
    optimizer = DeltaLoRA(model, lr=1.0, weight_decay=0, update_ratio=1000.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a step says nothing
        for _ in range(3):
            for p in (model[0].lora_A, model[0].lora_B):
                p.grad = -torch.ones_like(p)
            optimizer.step()
    return model, optimizer


def test_it_is_said_once_when_a_state_or_an_adapter_is_saved(tmp_path):
    model, optimizer = trained()
    assert (model[0].weight == 65504).all()
    with pytest.warns(UserWarning, match=f"48 elements of 0 {MESSAGE}.*bfloat16"):
        optimizer.state_dict()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
        save_adapter(model, tmp_path)
    with pytest.warns(UserWarning, match=MESSAGE):
        save_adapter(trained()[0], tmp_path)


@pytest.mark.parametrize("dtype, size", [(torch.float16, 50.0), (torch.bfloat16, 65000.0)])
def test_it_is_not_said_within_the_range(dtype, size, tmp_path):
    model, optimizer = trained(dtype, size)
    nn.init.zeros_(model[0].lora_B)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        optimizer.state_dict()
        save_adapter(model, tmp_path)
        merge_(model)


@pytest.mark.parametrize("sign", [1, -1])
def test_a_weight_that_was_at_the_end_before_is_no_news(sign):
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).half()
    nn.init.constant_(model[0].weight, sign * 65504.0)
    swap_(model, r=1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        DeltaLoRA(model, update_ratio=1.0).state_dict()


def test_merging_stops_at_the_end_of_the_range_and_says_so():
    model = nn.Sequential(nn.Linear(8, 6, bias=False)).half()
    nn.init.constant_(model[0].weight, 65000.0)
    swap_(model, r=1, lora_alpha=1)
    nn.init.ones_(model[0].lora_A)
    nn.init.constant_(model[0].lora_B, 1000.0)
    with pytest.warns(UserWarning, match=f"48 elements of 0 {MESSAGE}"):
        report = merge_(model)
    assert type(model[0]) is nn.Linear and (model[0].weight == 65504).all()
    assert 0 < report.rows[0].error < 0.01
