"""The layers that swapped ones stand for hold no weight of their own, so sharding frees it."""

import copy
import pickle

import pytest
import torch
from fsdp_runs import make_model, shard
from ranks import run_ranks
from torch import nn

from deltadiff import swap_, unswap_
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ranks import is_sharded


def bases_of_a_sharded_model(rank):
    layers = lora_layers(shard(make_model())).values()
    return [is_sharded(layer.base_layer.weight) for layer in layers]


def test_sharding_frees_the_whole_weights_at_once():
    """Not only when an optimizer is made: until then, there may be room for no more than parts."""
    for sharded in run_ranks(bases_of_a_sharded_model):
        assert sharded and all(sharded)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m)), None])
def test_a_base_layer_has_the_parameters_that_the_layer_has(bias, copied):
    model = nn.Sequential(nn.Linear(6, 4, bias=bias))
    eager = model[0]
    swap_(model, r=2, lora_alpha=4, target_modules=lambda *_: True)
    if copied:
        model = copied(model)
        eager = model[0].base_layer
    model.double()
    model[0].weight = nn.Parameter(torch.ones(4, 6).double())
    assert eager.weight is model[0].weight and eager.bias is model[0].bias
    x = torch.randn(3, 6).double()
    assert torch.equal(eager(x), model(x))  # B is 0
    unswap_(model)
    assert model[0] is eager and list(eager._parameters) == ["weight", "bias"]
    assert list(eager.state_dict()) == ["weight", "bias"][: 1 + bias]
    assert torch.equal(eager.weight, torch.ones(4, 6))
