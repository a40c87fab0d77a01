"""A W that was updated in place, in a model that is converted to other dtypes: nothing is lost."""

import pytest
import torch
from delta_lora_runs import make_model, make_peft_model, train, trainable
from torch import nn

from deltadiff import DeltaLoRA, merge_, swap_
from deltadiff.errors import SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ops.reference import join_remainder

BF16, F16, F32, F64 = torch.bfloat16, torch.float16, torch.float32, torch.float64
CHAINS = [
    (BF16, F16), (F16, BF16), (BF16, F32), (F16, F32), (BF16, F32, BF16), (F16, F64, F16),
    (BF16, F16, BF16), (BF16, F32, F16), (F16, F32, BF16), (F32, BF16), (F32, F16, F32),
    (F32, BF16, F16, F32),
]  # fmt: skip


def make_square_conv1d(dtype):
    """PEFT's pair on a Conv1D whose W could be taken for its transpose."""
    import peft
    from transformers.pytorch_utils import Conv1D

    torch.manual_seed(0)
    layers = Conv1D(12, 12), nn.Tanh(), nn.Linear(12, 3)
    config = peft.LoraConfig(r=4, target_modules=["0"], modules_to_save=["2"], fan_in_fan_out=True)
    model = peft.get_peft_model(nn.Sequential(*layers).to(dtype), config)
    swap_(model)
    return model


MAKERS = [make_model, make_peft_model, make_square_conv1d]


def make_run(make, dtype, **how):
    model = make(dtype)
    return model, DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update="inplace", **how)


def stay(model, optimizer):
    """A step that changes nothing, but takes over what it finds."""
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    train(model, optimizer, 1, start=9)


def exact(layer, low):
    w = layer.matrix.detach()
    return (w if low is None else join_remainder(w, low)).double()


def weights_of(model, optimizer=None):
    """W with the remainder that the layer has, or the one that an optimizer has."""
    found = []
    for layer in lora_layers(model).values():
        low = layer.delta.remainder
        low = low if optimizer is None else optimizer.state[layer.lora_B].get("remainder")
        found.append(exact(layer, low))
    return found


def assert_same(found, expected):
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours, theirs)


@pytest.mark.parametrize("chain", CHAINS, ids=lambda chain: "-".join(str(d)[6:] for d in chain))
@pytest.mark.parametrize("make", MAKERS)
def test_the_exact_weight_stays(make, chain):
    """With steps between, with another optimizer after, and in what is saved."""
    model, optimizer = make_run(make, chain[0])
    train(model, optimizer, 3)
    for dtype in chain[1:]:
        expected = weights_of(model)
        model.to(dtype)
        assert_same(weights_of(model), expected)
        assert all(layer.weight.dtype == dtype for layer in lora_layers(model).values())
    optimizer.state_dict()
    assert_same(weights_of(model, optimizer), expected)
    stay(model, optimizer)
    assert_same(weights_of(model, optimizer), expected)
    train(model, optimizer, 1, start=3)
    expected = weights_of(model, optimizer)
    model.to(chain[0])
    stay(*(model, DeltaLoRA(model, update_ratio=1.0, w_update="inplace")))
    assert_same(weights_of(model), expected)


@pytest.mark.parametrize("dtype", [BF16, F16])
@pytest.mark.parametrize("rounding", ["stochastic", "nearest"])
@pytest.mark.filterwarnings("ignore:.*nearest.*")
def test_a_rounding_without_remainder_goes_on_without_one(rounding, dtype):
    model, optimizer = make_run(make_model, F32, rounding=rounding)
    train(model, optimizer, 3)
    model.to(dtype)
    rounded = [layer.matrix.detach().double() for layer in lora_layers(model).values()]
    stay(model, optimizer)
    assert_same(weights_of(model), rounded)
    assert all(layer.delta.remainder is None for layer in lora_layers(model).values())


@pytest.mark.parametrize("make", MAKERS)
def test_a_weight_that_was_not_updated_gets_no_remainder(make):
    model = make(F32)
    optimizer = DeltaLoRA(model, update_ratio=1.0, w_update="inplace", start_step=8)
    train(model, optimizer, 2)
    model.to(BF16)
    assert all(layer.delta.remainder is None for layer in lora_layers(model).values())


@pytest.mark.parametrize("dtypes", [(BF16, F16), (F16, BF16), (BF16, F32), (F16, F64)])
def test_a_weight_that_was_converted_alone_is_refused(dtypes):
    """Its remainder belongs to another dtype, and would be added as what it is not."""
    model, optimizer = make_run(make_model, dtypes[0])
    train(model, optimizer, 3)
    for layer in lora_layers(model).values():
        layer.weight.data = layer.weight.data.to(dtypes[1])
    before = [t.detach().clone() for t in (*trainable(model), model[0].weight)]
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    for call in (optimizer.step, optimizer.state_dict, lambda: merge_(model)):
        with pytest.raises(SwapError, match=rf"^0: .*{dtypes[1]}, beside .*{dtypes[0]}.*model.to"):
            call()
    for ours, theirs in zip((*trainable(model), model[0].weight), before, strict=True):
        assert torch.equal(ours, theirs)
