"""FSDP2: two processes that hold a half of the model each are one process, bit by bit."""

import pytest
import torch
import torch.distributed as dist
from fsdp_runs import METHODS, make_base, make_model, parts_of, shard, train, values
from ranks import run_ranks, short_form
from torch.distributed.fsdp import CPUOffloadPolicy, MixedPrecisionPolicy

from deltadiff import DeltaLoRA, swap_, unswap_
from deltadiff.errors import ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ranks import is_sharded, local, whole

F32, BF16 = torch.float32, torch.bfloat16


def train_sharded(rank, method, options, r=8):
    dtype, how = METHODS[method]
    model = shard(make_model(dtype, r), **options)
    optimizer = DeltaLoRA(model, lr=5e-3, **how)
    train(model, optimizer, rank, dist.get_world_size())
    assert all(is_sharded(p) for p in model.parameters())
    return values(model)


def train_alone(method, size=2, r=8):
    dtype, how = METHODS[method]
    model = make_model(dtype, r)
    train(model, DeltaLoRA(model, lr=5e-3, **how), size=size)
    return values(model)


@pytest.mark.filterwarnings("ignore:.*rounding")
@pytest.mark.parametrize("method", short_form(METHODS, "stochastic", "factored, K = 2"))
def test_two_processes_are_one_bit_by_bit(method):
    first, second = run_ranks(train_sharded, method, {})
    assert first == second == train_alone(method)


def make_lean(checkpointing):
    model = make_base(F32).train()
    report = swap_(model, r=8, lora_alpha=16, seed=1, lean=True)
    assert report.lean and not any(row.why_not for row in report.lean)
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def train_lean(rank, checkpointing):
    model = shard(make_lean(checkpointing))
    train(model, DeltaLoRA(model, lr=5e-3), rank, dist.get_world_size(), 3)
    return values(model)


@pytest.mark.parametrize("checkpointing", short_form([False, True], True))
def test_lean_blocks_of_two_processes_are_those_of_one(checkpointing):
    model = make_lean(checkpointing)
    train(model, DeltaLoRA(model, lr=5e-3), steps=3)
    assert run_ranks(train_lean, checkpointing) == [values(model)] * 2


def checkpointed(rank):
    """Activations that are computed again; clipping; the parameters stay whole between passes."""
    found = []
    for options in ({}, {"reshard_after_forward": False}):
        model = make_model()
        model.gradient_checkpointing_enable({"use_reentrant": False})
        model = shard(model.train(), **options)
        optimizer = DeltaLoRA(model, lr=5e-3)
        for t in range(3):
            ids = parts_of(t, 2)[rank]
            model(input_ids=ids, labels=ids).loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
            optimizer.step()
            optimizer.zero_grad()
        found.append(values(model))
    return found


def clipped_alone():
    model = make_model()
    optimizer = DeltaLoRA(model, lr=5e-3)
    for t in range(3):
        for ids in parts_of(t, 2):
            (model(input_ids=ids, labels=ids).loss / 2).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 0.05)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def sum_inside_the_run(rank, options):
    """How far W_T - W_0 of a run is from lambda s (B_T A_T - B_k A_k), relative to its size."""
    model = shard(make_model(), **options)
    layers = {name: m for name, m in lora_layers(model).items()}
    before = {name: whole(m.weight) for name, m in layers.items()}
    optimizer = DeltaLoRA(model, lr=5e-3)
    train(model, optimizer, rank, dist.get_world_size())
    errors = []
    for name, m in layers.items():
        change, sums = whole(m.weight) - before[name], m.delta.product()
        errors.append(((change - sums.B @ sums.A).norm() / change.norm()).item())
    return max(errors), values(model)


def mixed(rank):
    """bf16 parameters in the passes, and CPU offloading, which is nothing on a CPU."""
    policy = MixedPrecisionPolicy(param_dtype=BF16, reduce_dtype=F32)
    losses = []
    for w_update in ("inplace", "factored"):
        model = shard(
            make_model(), mp_policy=policy, offload_policy=CPUOffloadPolicy(pin_memory=False)
        )
        optimizer = DeltaLoRA(model, lr=5e-3, w_update=w_update)
        train(model, optimizer, rank, 2, steps=3)
        ids = parts_of(9, 2)[0]
        losses.append(model(input_ids=ids, labels=ids).loss.item())
    return losses


def wrong_orders(rank):
    texts = []
    for how in ({"update_ratio": 0.0}, {}, {"w_update": "factored"}):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=5e-3, **how)
        shard(model)
        ids = parts_of(0, 2)[rank]
        model(input_ids=ids, labels=ids).loss.backward()
        with pytest.raises(SwapError) as error:
            optimizer.step()
        texts.append(str(error.value))
    model = make_model()
    shard(unswap_(model))
    with pytest.raises(ArgumentTypeError) as error:
        swap_(model)
    return [*texts, str(error.value)]


def unswapped(rank, dtype):
    """What a model has after `unswap_` and a step on all weights; without a rank, a whole one."""
    model, optimizer = make_model(dtype), None
    if rank is not None:
        model = shard(model)
    optimizer = DeltaLoRA(model, lr=5e-3, update_ratio=0.0)
    train(model, optimizer, rank, steps=2)
    if rank is not None:
        model(input_ids=parts_of(9, 2)[rank])  # which leaves some parameters whole
    unswap_(model)
    train(model, torch.optim.SGD(model.parameters(), lr=0.1), rank, steps=2)
    return [type(m).__name__.removeprefix("FSDP") for m in model.modules()], values(model)


def left_unsharded(rank):
    """A step while whole parameters stand in their places is not lost to the next pass."""
    model = shard(make_model())
    model.set_reshard_after_backward(False)
    optimizer = DeltaLoRA(model, lr=5e-3)
    train(model, optimizer, rank, 2)
    return values(model)


def infinite_in_one(rank):
    """A step that one process has to skip is skipped by all."""
    model = shard(make_model())
    optimizer = DeltaLoRA(model, lr=5e-3, skip_nonfinite=True)
    train(model, optimizer, rank, 2, steps=3)
    before = values(model)
    ids = parts_of(7, 2)[rank]
    model(input_ids=ids, labels=ids).loss.backward()
    if rank == 1:
        local(next(p for p in model.parameters() if p.grad is not None).grad).fill_(torch.inf)
    optimizer.step()
    return before == values(model), int(
        optimizer.state_dict()["param_groups"][0]["deltadiff.iteration"]
    )


def test_checkpointing_clipping_and_resharding():
    (first, also), (second, _) = run_ranks(checkpointed)
    assert first == also == second
    for ours, theirs in zip(first, clipped_alone(), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("size", short_form([3, 4], 3))
def test_the_sum_holds_for_other_numbers_of_processes(size):
    results = run_ranks(sum_inside_the_run, {}, size=size)
    assert all(values_ == results[0][1] for _, values_ in results)
    assert max(error for error, _ in results) < 1e-5


def test_a_rank_below_the_number_of_processes():
    first, second, third = run_ranks(train_sharded, "remainder", {}, 2, size=3)
    assert first == second == third


def test_mixed_precision_and_offloading():
    (inplace, factored), other = run_ranks(mixed)
    assert [inplace, factored] == other
    assert abs(inplace - factored) < 2e-3


def test_wrong_orders_are_refused_in_words():
    for texts in run_ranks(wrong_orders):
        assert all("`swap_`, then `fully_shard`, then the optimizer" in text for text in texts[:3])
        assert "call `swap_` before `fully_shard`" in texts[3]


@pytest.mark.parametrize("dtype", short_form([F32, BF16], BF16))
def test_a_sharded_model_is_eager_again_and_trains_its_own_weights(dtype):
    first, second = run_ranks(unswapped, dtype)
    (kinds, found), (whole_kinds, expected) = first, unswapped(None, dtype)
    assert first == second and kinds == whole_kinds and "LoraLinear" not in kinds
    assert found == expected


def test_a_model_left_unsharded_trains_as_well():
    first, second = run_ranks(left_unsharded)
    assert first == second == train_alone("in place")


def test_a_step_that_one_process_skips_is_skipped_by_all():
    assert run_ranks(infinite_in_one) == [(True, 3)] * 2
