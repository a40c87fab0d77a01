"""Data parallelism by DDP: two processes with half of each batch are one with all of it."""

import contextlib

import pytest
import torch
import torch.distributed as dist
from delta_lora_runs import batch, make_model, make_peft_model
from ranks import run_ranks, short_form
from torch.nn.parallel import DistributedDataParallel

from deltadiff import DeltaLoRA

F32, BF16 = torch.float32, torch.bfloat16
METHODS = {
    "LoRA": (F32, {"update_ratio": 0.0}),
    "factored": (F32, {"w_update": "factored"}),
    "in place": (F32, {}),
    "in place, remainder": (BF16, {"rounding": "remainder"}),
    "in place, stochastic": (BF16, {"rounding": "stochastic", "seed": 3}),
    "in place, nearest": (BF16, {"rounding": "nearest"}),
}
OPTIONS = {
    "plain": {},
    "static graph": {"static_graph": True},
    "bucket views": {"gradient_as_bucket_view": True},
    "unused parameters": {"find_unused_parameters": True},
}
STEPS = 5


def batches_of(options):
    """Batches of a step; a static graph is recorded in the first pass, so it waits for none."""
    return 1 if options == "static graph" else 2


def loss_of(model, like, t, part, parts):
    x, y = (half.chunk(parts)[part] for half in batch(t, like))
    return (model(x) - y).square().mean()


def values(model):
    return [p.detach().float().flatten().tolist() for p in model.parameters()]


def train_in_group(rank, make, method, options):
    """What a process has after some steps; it waits for the other in the last batch of each."""
    (dtype, how), count = METHODS[method], batches_of(options)
    model = make(dtype)
    parallel = DistributedDataParallel(model, **OPTIONS[options])
    optimizer = DeltaLoRA(parallel, lr=1e-2, **how)
    for t in range(STEPS):
        for i in range(count):
            with parallel.no_sync() if i + 1 < count else contextlib.nullcontext():
                loss_of(parallel, model, 2 * t + i, rank, dist.get_world_size()).backward()
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


def train_alone(make, method, options, parts=2):
    """What one process computes from the same parts of the same batches."""
    dtype, how = METHODS[method]
    model = make(dtype)
    optimizer = DeltaLoRA(model, lr=1e-2, **how)
    params = [p for p in model.parameters() if p.requires_grad]
    for t in range(STEPS):
        sums = []
        for part in range(parts):
            for i in range(batches_of(options)):
                loss_of(model, model, 2 * t + i, part, parts).backward()
            sums.append([p.grad for p in params])
            optimizer.zero_grad()
        for p, *grads in zip(params, *sums, strict=True):
            p.grad = torch.stack([g / parts for g in grads]).sum(0)
        optimizer.step()
        optimizer.zero_grad()
    return values(model)


@pytest.mark.filterwarnings("ignore:.*rounding")
@pytest.mark.parametrize("method", short_form(METHODS, "in place, remainder"))
def test_two_processes_are_one_bit_by_bit(method):
    first, second = run_ranks(train_in_group, make_model, method, "plain")
    assert first == second == train_alone(make_model, method, "plain")


@pytest.mark.parametrize("options", short_form(list(OPTIONS)[1:], "bucket views"))
def test_options_of_ddp(options):
    first, second = run_ranks(train_in_group, make_model, "in place", options)
    assert first == second == train_alone(make_model, "in place", options)


@pytest.mark.parametrize("method", short_form(["LoRA", "factored"]))
def test_layers_of_peft(method):
    first, second = run_ranks(train_in_group, make_peft_model, method, "plain")
    assert first == second == train_alone(make_peft_model, method, "plain")
