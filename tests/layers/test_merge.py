"""`merge_` computes in float32 and rounds once."""

import pytest
import torch
from torch import nn

from deltadiff import DeltaLoRA, merge_, swap_
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.lora_layers import lora_layers


def trained(dtype, w_update=None, rounding=None) -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.Tanh(), nn.Linear(40, 8)).to(dtype)
    swap_(model, r=3, seed=0)
    ratio = 0.0 if w_update is None else 1.0
    optimizer = DeltaLoRA(
        model, lr=1e-2, update_ratio=ratio, w_update=w_update or "inplace", rounding=rounding
    )
    for _ in range(6):
        optimizer.zero_grad()
        model(torch.randn(16, 24, dtype=dtype)).square().mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize("w_update", [None, "inplace", "factored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_merged_model_is_eager_and_equal(dtype, w_update):
    model = trained(dtype, w_update)
    x = torch.randn(64, 24, dtype=dtype)
    with torch.no_grad():
        before = model(x).double()
        report = merge_(model)
        after = model(x).double()
    assert type(model[0]) is nn.Linear and not lora_layers(model)
    limit = 4 * torch.finfo(dtype).eps
    assert (after - before).norm() / before.norm() < limit
    assert len(report.rows) == 2 and report.rows[0].error <= torch.finfo(dtype).eps / 2
    assert (report.rows[0].error > 0) == (dtype in (torch.bfloat16, torch.float16))
    assert "24" in str(report) and "relative error" in str(report)


def test_rounding_happens_once_and_uses_the_remainder():
    model = trained(torch.bfloat16, "inplace", "remainder")
    layer = model[0]
    w = layer.weight.detach().view(torch.int16).int() << 16
    wide = (w + layer.delta.remainder.int()).view(torch.float32)
    exact = wide.double() + layer.scaling * layer.lora_B.double() @ layer.lora_A.double()
    merge_(model)
    assert torch.equal(model[0].weight, exact.float().to(torch.bfloat16))


def test_merge_needs_swapped_layers_and_writable_weights():
    with pytest.raises(SwapError, match="without swapped layers"):
        merge_(nn.Linear(3, 3))
    model = nn.Sequential()
    model.embed, model.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    model.head.weight = model.embed.weight
    swap_(model, r=2, target_modules=["head"])
    before = model.embed.weight.detach().clone()
    nn.init.ones_(model.head.lora_B)
    with pytest.raises(ArgumentError, match="shared by embed, head"):
        merge_(model)
    assert torch.equal(model.embed.weight, before)
