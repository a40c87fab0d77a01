"""How base weights may be stored: what a layer does with each format."""

import pytest
import torch
from torch import nn

from deltadiff import merge_, swap_
from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.base_format import base_format

F32, F64, BF16, F16 = torch.float32, torch.float64, torch.bfloat16, torch.float16


class Int8Linear(nn.Linear):
    """A quantised layer: its weight holds multiples of 1/64."""

    def __init__(self, in_features, out_features):
        super().__init__(in_features, out_features)
        whole = torch.arange(in_features * out_features).view(out_features, in_features) % 7 - 3
        self.weight = nn.Parameter(whole.to(torch.int8), requires_grad=False)

    def forward(self, x):
        return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)


@pytest.mark.parametrize(
    ("stored", "accepted", "default"),
    [
        (F32, {F32}, F32),
        (F64, {F64}, F64),
        (BF16, {BF16, F32}, F32),
        (F16, {F16, F32}, F32),
        (torch.int8, {F32}, F32),
    ],
)
def test_dtypes_of_the_pair_beside_each_format(stored, accepted, default):
    def model():
        layer = Int8Linear(8, 6) if stored == torch.int8 else nn.Linear(8, 6).to(stored)
        return nn.Sequential(layer)

    for dtype in (None, F32, F64, BF16, F16):
        swapped = model()
        if dtype is None or dtype in accepted:
            swap_(swapped, r=2, adapter_dtype=dtype)
            assert swapped[0].lora_A.dtype == swapped[0].lora_B.dtype == (dtype or default)
        else:
            with pytest.raises(ArgumentTypeError, match="adapter_dtype"):
                swap_(swapped, r=2, adapter_dtype=dtype)
    form = base_format(model()[0])
    assert form.writable == (stored != torch.int8)


def test_a_quantised_layer_adds_the_branch_to_its_own_product(randn):
    model, x = nn.Sequential(Int8Linear(64, 10)), randn(8, 64)
    y = model(x)
    swap_(model, r=2, lora_alpha=6)
    layer = model[0]
    assert layer.dispatch.backend == "reference" and torch.equal(model(x), y)  # B = 0
    nn.init.normal_(layer.lora_B)
    layer.gate = torch.tensor([0.5, 2.0])
    branch = 3 * (x @ layer.lora_A.T * layer.gate) @ layer.lora_B.T
    torch.testing.assert_close(model(x), y + branch)
    with pytest.raises(ArgumentTypeError, match=r"torch.int8 \(quantised\)"):
        merge_(model)
    assert model[0] is layer


def test_dropout_of_a_quantised_layer(randn):
    model = nn.Sequential(Int8Linear(64, 10))
    swap_(model, r=2, lora_dropout=0.5)
    nn.init.normal_(model[0].lora_B)
    x = randn(8, 64)
    assert not torch.equal(model(x), model(x))
    model.eval()
    assert torch.equal(model(x), model(x))
