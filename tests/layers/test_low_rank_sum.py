"""`low_rank_sum`: the value, and the rank, of all that training added to a weight."""

import pytest
import torch
from torch import nn
from trained_adapters import base, trained

from deltadiff import swap_
from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.low_rank_factors import LowRankFactors
from deltadiff.layers.low_rank_sum import low_rank_sum


def layer_of(n=6, k=5, r=2, lora_alpha=3.0):
    model = nn.Sequential(nn.Linear(k, n)).double()
    swap_(model, r=r, lora_alpha=lora_alpha, seed=0)
    nn.init.normal_(model[0].lora_B)
    return model[0]


def assert_is(layer, product, rank):
    b, a = low_rank_sum("x", [layer])
    assert a.dtype == b.dtype == torch.float32 and a.shape[0] == b.shape[1] == rank
    found, product = b.double() @ a.double(), product.detach()
    assert (found - product).norm() <= 1e-7 * b.norm() * a.norm()


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
@pytest.mark.parametrize("values", [1, 2, 3])
def test_each_value_of_lambda_adds_r(w_update, values):
    model, _ = trained(w_update, ratio_at=lambda t: 0.5 / (1 + t * values // 8))
    layer, start = model[0], base()[0].weight
    now = layer.matrix + layer.scaling * layer.lora_B @ layer.lora_A
    if w_update == "factored":
        past = sum(p.B @ p.A for p in layer.delta.past_updates)
        now = now + past + (p := layer.delta.product()).B @ p.A
    assert_is(layer, now - start, 3 * (values + 1))


def test_a_gate_is_multiplied_in_and_zeros_take_no_rank():
    layer = layer_of()
    pair = layer.lora_B, layer.lora_A
    for gate, rank in (([2.0, 0.0], 1), ([0.0, 0.0], 1), ([0.5], 2)):
        layer.gate = torch.tensor(gate, dtype=torch.float64)
        assert_is(layer, layer.scaling * (pair[0] * layer.gate) @ pair[1], rank)
        layer.gate = None


def test_no_rank_is_above_the_smaller_side():
    for n, k in ((3, 5), (5, 3)):
        layer = layer_of(n, k)
        more = LowRankFactors(torch.randn(n, 4).double(), torch.randn(4, k).double(), True)
        swapped = layer.scaling * layer.lora_B @ layer.lora_A + more.B @ more.A
        model, _ = trained()
        layer.delta = model[0].delta
        layer.delta.rank_scale = torch.zeros(1)  # nothing but the past
        layer.delta.past_updates = [more]
        assert_is(layer, swapped, 3)


def test_what_has_no_values_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    swap_(model, r=2)
    model.to("meta")
    with pytest.raises(ArgumentTypeError, match="0: got a tensor on meta"):
        low_rank_sum("0", [model[0]])
