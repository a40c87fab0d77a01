"""FSDP2 over weights in FP8: data and scales are sharded, and two processes are one, bit by bit."""

import pytest
import torch
from fsdp_runs import (
    FACTORED,
    load_checkpoint,
    make_base,
    of_trained,
    parts_of,
    save_checkpoint,
    shard,
    train,
    trained_peft,
)  # fmt: skip
from ranks import run_ranks
from torch.distributed.fsdp import MixedPrecisionPolicy

from deltadiff import DeltaLoRA, quantise_, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ranks import is_sharded, local

F32, BF16 = torch.float32, torch.bfloat16
CASES = [("block", False), ("block", True), ("row", False), ("tensor", True)]  # and lean


def make_model(granularity="block", lean=False, dtype=F32):
    model = make_base(dtype).train()
    quantise_(model, "fp8", granularity=granularity)
    swap_(model, r=8, lora_alpha=16, seed=1, lean=lean)
    return model


def train_sharded(rank, *case):
    model = shard(make_model(*case))
    train(model, DeltaLoRA(model, **FACTORED), rank, steps=3)
    return of_trained(model)


@pytest.mark.long  # the short form does the same over 4 bits
@pytest.mark.parametrize("case", CASES, ids=str)
def test_two_processes_are_one_bit_by_bit(case):
    alone = make_model(*case)
    train(alone, DeltaLoRA(alone, **FACTORED), steps=3)
    assert run_ranks(train_sharded, *case) == [of_trained(alone)] * 2


def what_each_holds(rank):
    """The bytes of W here and in all, before and after a pass; the report."""
    model = make_model()
    paths = [row.reason for row in swap_report(model).rows]
    shard(model)
    found = []
    for _ in range(2):
        layers = lora_layers(model).values()
        assert all(is_sharded(layer.base_layer.weight) for layer in layers)
        found += [(local(q.weight).nbytes, q.in_features * q.out_features) for q in layers]
        assert [row.reason for row in swap_report(model).rows] == paths
        model(input_ids=parts_of(0, 2)[rank]).logits.sum().backward()
    return found


@pytest.mark.long
def test_each_process_holds_its_half_of_the_bytes():
    for (first, size), (second, _) in zip(*run_ranks(what_each_holds), strict=True):
        assert first == second == size // 2


def resumed(rank, folder):
    model = shard(make_model())
    optimizer = DeltaLoRA(model, **FACTORED)
    train(model, optimizer, rank, steps=2)
    save_checkpoint(model, optimizer, folder)
    train(model, optimizer, rank, steps=2)
    again = shard(make_model())
    other = DeltaLoRA(again, **FACTORED)
    load_checkpoint(again, other, folder)
    train(again, other, rank, steps=2)
    return of_trained(model) == of_trained(again)


@pytest.mark.long
def test_a_checkpoint_goes_on_bit_by_bit(tmp_path):
    assert run_ranks(resumed, str(tmp_path)) == [True, True]


def refused(rank):
    model = shard(make_model())
    with pytest.raises(ArgumentTypeError, match="w_update='factored'"):
        DeltaLoRA(model, lr=5e-3)
    model = shard(make_model(), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    with pytest.raises(SwapError) as error:
        model(input_ids=parts_of(0, 2)[rank])
    return str(error.value)


@pytest.mark.long
def test_what_is_refused():
    for text in run_ranks(refused):
        assert "torch.bfloat16 beside scales of FP8" in text and "param_dtype" in text


def unswapped(rank):
    model = make_base(F32).train()
    quantise_(model, "fp8")
    ids = parts_of(0, 2)[rank]
    before = model(input_ids=ids).logits
    swap_(model, r=8, seed=1)
    shard(model)
    model(input_ids=ids)
    unswap_(model)
    return torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.long
def test_the_layers_run_sharded_when_the_pairs_are_gone():
    assert run_ranks(unswapped) == [True, True]


def make_peft_model():
    import peft

    base = make_base(F32)
    quantise_(base, "fp8")
    torch.manual_seed(1)
    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    model = peft.get_peft_model(base, config).train()
    swap_(model)
    return model


def train_peft(rank):
    return trained_peft(rank, make_peft_model())


@pytest.mark.long
def test_layers_of_peft():
    alone = make_peft_model()
    train(alone, DeltaLoRA(alone, **FACTORED), steps=3)
    assert run_ranks(train_peft) == [(of_trained(alone), True, {"cpp"})] * 2
