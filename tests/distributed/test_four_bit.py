"""FSDP2 over weights of 4 bits: their bytes are sharded, and two processes are one, bit by bit."""

import pytest
import torch
from fsdp_runs import (
    FACTORED,
    load_checkpoint,
    make_base,
    of_trained,
    parts_of,
    quantise_,
    save_checkpoint,
    shard,
    train,
    trained_peft,
)
from ranks import run_ranks, short_form
from torch.distributed.fsdp import MixedPrecisionPolicy

from deltadiff import DeltaLoRA, swap_, swap_report, unswap_
from deltadiff.errors import ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ranks import is_sharded, local

pytest.importorskip("bitsandbytes")

F32, BF16, U8 = torch.float32, torch.bfloat16, torch.uint8
# The dtype in which the bytes are stored, the backend of the layers, whether blocks are lean.
HOW = ("cpp", True), (None, False)
CASES = [(storage, *how) for storage in (U8, BF16, F32) for how in HOW]


def make_model(storage=U8, backend="cpp", lean=False):
    model = quantise_(make_base(F32), storage).train()
    swap_(model, r=8, lora_alpha=16, seed=1, backend=backend, lean=lean)
    return model


def trained(model):
    return [p for p in model.parameters() if p.requires_grad]


def train_sharded(rank, *case):
    model = shard(make_model(*case))
    train(model, DeltaLoRA(model, **FACTORED), rank, steps=3)
    return of_trained(model)


@pytest.mark.parametrize("case", short_form(CASES, (BF16, "cpp", True)), ids=str)
def test_two_processes_are_one_bit_by_bit(case):
    alone = make_model(*case)
    train(alone, DeltaLoRA(alone, **FACTORED), steps=3)
    assert run_ranks(train_sharded, *case) == [of_trained(alone)] * 2


def what_each_holds(rank, storage):
    """The bytes of W here and in all, before and after a pass; who else holds it; the report."""
    model = make_model(storage)
    paths = [row.reason for row in swap_report(model).rows]
    shard(model)
    found = []
    for _ in range(2):
        layers = lora_layers(model).values()
        assert all(is_sharded(layer.base_layer.weight) for layer in layers)
        found += [(local(layer.weight).nbytes, layer.in_features, layer.out_features)
                  for layer in layers]  # fmt: skip
        assert [row.reason for row in swap_report(model).rows] == paths
        model(input_ids=parts_of(0, 2)[rank]).logits.sum().backward()
    return found


@pytest.mark.parametrize("storage", short_form([U8, BF16]))
def test_each_process_holds_its_half_of_the_bytes(storage):
    for (first, k, n), (second, *_) in zip(*run_ranks(what_each_holds, storage), strict=True):
        assert first == second == k * n // 4


def resumed(rank, folder):
    model = shard(make_model(BF16))
    optimizer = DeltaLoRA(model, **FACTORED)
    train(model, optimizer, rank, steps=2)
    save_checkpoint(model, optimizer, folder)
    train(model, optimizer, rank, steps=2)
    again = shard(make_model(BF16))
    other = DeltaLoRA(again, **FACTORED)
    load_checkpoint(again, other, folder)
    train(again, other, rank, steps=2)
    return of_trained(model) == of_trained(again)


@pytest.mark.long
@pytest.mark.filterwarnings("ignore:the state of a sharded model leaves out")
def test_a_checkpoint_goes_on_bit_by_bit(tmp_path):
    assert run_ranks(resumed, str(tmp_path)) == [True, True]


def in_place(rank, storage):
    model = shard(make_model(storage))
    with pytest.raises(ArgumentTypeError) as error:
        DeltaLoRA(model, lr=5e-3)
    return str(error.value)


@pytest.mark.parametrize("storage", short_form([U8, BF16, F32], BF16))
def test_in_place_is_refused_whatever_dtype_the_bytes_have(storage):
    for text in run_ranks(in_place, storage):
        assert "(quantised)" in text and "w_update='factored'" in text


def cast_bytes(rank):
    model = shard(make_model(F32), mp_policy=MixedPrecisionPolicy(param_dtype=BF16))
    with pytest.raises(SwapError) as error:
        model(input_ids=parts_of(0, 2)[rank])
    return str(error.value)


@pytest.mark.long
def test_bytes_that_mixed_precision_casts_are_refused():
    for text in run_ranks(cast_bytes):
        assert "bytes of torch.bfloat16 in the place of" in text and "param_dtype" in text


def unswapped(rank):
    model = quantise_(make_base(F32), BF16).train()
    ids = parts_of(0, 2)[rank]
    before = model(input_ids=ids).logits
    swap_(model, r=8, lora_alpha=16, seed=1)
    shard(model)
    model(input_ids=ids)
    unswap_(model)
    return torch.equal(model(input_ids=ids).logits, before)


@pytest.mark.long
def test_the_layers_of_bitsandbytes_run_sharded_when_they_are_back():
    assert run_ranks(unswapped) == [True, True]


def make_peft_model(backend="cpp"):
    import peft

    config = peft.LoraConfig(r=8, lora_alpha=16, target_modules="all-linear")
    base = quantise_(make_base(F32), BF16)
    base.is_loaded_in_4bit = True  # which PEFT asks
    torch.manual_seed(1)
    model = peft.get_peft_model(base, config).train()
    swap_(model, backend=backend)
    return model


def train_peft(rank):
    return trained_peft(rank, make_peft_model())


@pytest.mark.long
def test_layers_of_peft():
    alone = make_peft_model()
    train(alone, DeltaLoRA(alone, **FACTORED), steps=3)
    assert run_ranks(train_peft) == [(of_trained(alone), True, {"cpp"})] * 2
