"""Layers of PEFT under FSDP2: fused in every call, and equal to one process bit by bit.

PEFT's policy for FSDP, which Trainer sets, makes each lora_A and lora_B a unit of its own.
"""

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import make_peft_model, parts_of, shard_peft, train, values
from peft_checks import fused_calls
from ranks import run_ranks, short_form
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

from deltadiff import DeltaLoRA, swap_report

HOW = {
    "LoRA": {"update_ratio": 0.0},
    "in place": {"w_update": "inplace"},
    "factored": {"w_update": "factored"},
}
LAYERS = 14
BF16 = MixedPrecisionPolicy(param_dtype=torch.bfloat16, reduce_dtype=torch.float32)


def prefetched(model):
    """Let FSDP gather the weights of the next units while a layer runs."""
    units = [
        m for n, m in model.named_modules() if n.endswith((".lora_A.default", ".lora_B.default"))
    ]
    for unit, *following in zip(units, units[1:], units[2:], strict=False):
        unit.set_modules_to_forward_prefetch(following)
    for unit, *before in zip(units[2:], units[1:], units, strict=False):
        unit.set_modules_to_backward_prefetch(before)


def train_variant(rank, variant, how, steps=3, r=8):
    """The parameters after some steps; every call of every layer was fused."""
    model = make_peft_model(r=r).train()
    passes = 1
    if variant.startswith("checkpointing"):
        reentrant = variant.endswith("reentrant")
        model.gradient_checkpointing_enable({"use_reentrant": reentrant})
        if reentrant:
            model.enable_input_require_grads()
        passes = 2
    options = {"reshard_after_forward": False} if variant == "left whole" else {}
    policy = {"mp_policy": BF16} if variant.endswith("bf16") else {}
    if variant == "W alone":
        for name, module in model.named_modules():
            if name.endswith("base_layer"):
                fully_shard(module)
    model = shard_peft(model, not variant.startswith("by blocks"), **options, **policy)
    if variant == "prefetch":
        prefetched(model)
    assert {row.path for row in swap_report(model).rows} == {"cpp"}
    optimizer = DeltaLoRA(model, lr=5e-3, **HOW[how])
    with fused_calls(model) as calls:
        train(model, optimizer, rank, dist.get_world_size(), steps)
    assert sum(calls.values()) == LAYERS * steps * passes, calls
    return values(model)


def all_variants(rank, how, variants):
    return {variant: train_variant(rank, variant, how) for variant in variants}


def alone(how):
    model = make_peft_model()
    train(model, DeltaLoRA(model, lr=5e-3, **HOW[how]), steps=3)
    return values(model)


VARIANTS = (
    "by blocks", "each matrix alone", "left whole", "W alone", "prefetch", "checkpointing",
    "checkpointing, reentrant",
)  # fmt: skip


SHORT = ("by blocks", "each matrix alone", "checkpointing")
CASES = [("factored", SHORT), *((how, VARIANTS) for how in HOW)]


@pytest.mark.parametrize("case", short_form(CASES, ("factored", SHORT)), ids=str)
def test_two_processes_are_one_bit_by_bit(case):
    how, variants = case
    first, second = run_ranks(all_variants, how, variants)
    assert first == second == dict.fromkeys(variants, alone(how))


@pytest.mark.long
@pytest.mark.parametrize("how", HOW)
def test_a_policy_of_mixed_precision(how):
    first, second = run_ranks(all_variants, how, ("by blocks, bf16", "each matrix alone, bf16"))
    assert first == second
    by_blocks, each_alone = first.values()
    assert by_blocks == each_alone


def accumulate(rank, how):
    model = shard_peft(make_peft_model(), alone=True)
    optimizer = DeltaLoRA(model, lr=5e-3, **HOW[how])
    for t in range(3):
        for last in (False, True):
            model.set_requires_gradient_sync(last)
            ids = parts_of(2 * t + last, 2)[rank]
            model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def accumulate_alone(how):
    """The gradients of each process are summed first, as FSDP does it."""
    model = make_peft_model()
    optimizer = DeltaLoRA(model, lr=5e-3, **HOW[how])
    trained = [p for p in model.parameters() if p.requires_grad]
    for t in range(3):
        sums = []
        for rank in range(2):
            for last in (False, True):
                ids = parts_of(2 * t + last, 2)[rank]
                model(input_ids=ids, labels=ids).loss.backward()
            sums.append([p.grad for p in trained])
            optimizer.zero_grad()
        for p, *grads in zip(trained, *sums, strict=True):
            p.grad = sum(grads) / 2
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.long
@pytest.mark.parametrize("how", HOW)
def test_gradients_that_are_reduced_later(how):
    first, second = run_ranks(accumulate, how)
    assert first == second == accumulate_alone(how)


def low_rank(rank):
    return train_variant(rank, "each matrix alone", "in place", r=2)


@pytest.mark.long
def test_a_rank_below_the_number_of_processes():
    first, second, third = run_ranks(low_rank, size=3)
    assert first == second == third
