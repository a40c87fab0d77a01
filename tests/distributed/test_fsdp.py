"""FSDP2: two processes that hold a half of the model each are one process, bit by bit."""

import pytest
import torch
import torch.distributed as dist
import transformers
from ranks import run_ranks
from torch.distributed.fsdp import fully_shard

from deltadiff import DeltaLoRA, swap_
from deltadiff.ranks import is_sharded, whole

F32, BF16 = torch.float32, torch.bfloat16
METHODS = {
    "LoRA": (F32, {"update_ratio": 0.0}),
    "factored": (F32, {"w_update": "factored"}),
    "factored, K = 2": (F32, {"w_update": "factored", "start_step": 2}),
    "in place": (F32, {}),
    "in place, K = 2": (F32, {"start_step": 2}),
    "remainder": (BF16, {"rounding": "remainder"}),
    "stochastic": (BF16, {"rounding": "stochastic", "seed": 3}),
    "nearest": (BF16, {"rounding": "nearest"}),
}
STEPS = 6


def make_model(dtype=F32, r=8):
    sizes = {"vocab_size": 96, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 2}
    torch.manual_seed(0)
    config = transformers.LlamaConfig(**sizes, num_attention_heads=4, use_cache=False)
    model = transformers.LlamaForCausalLM(config).to(dtype)
    swap_(model, r=r, lora_alpha=2 * r, seed=1)
    return model


def shard(model, **options):
    for layer in model.model.layers:
        fully_shard(layer, **options)
    return fully_shard(model, **options)


def parts_of(step, parts):
    generator = torch.Generator().manual_seed(100 + step)
    return torch.randint(96, (4, 12), generator=generator).chunk(parts)


def train(model, optimizer, rank=None, size=2, steps=STEPS):
    """With a rank, on its part of each batch; else on all parts, one after the other."""
    for t in range(steps):
        parts = parts_of(t, size)
        for ids in parts if rank is None else [parts[rank]]:
            loss = model(input_ids=ids, labels=ids).loss
            (loss / size if rank is None else loss).backward()
        optimizer.step()
        optimizer.zero_grad()


def values(model):
    return [whole(p).float().flatten().tolist() for p in model.parameters()]


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
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_are_one_bit_by_bit(method):
    first, second = run_ranks(train_sharded, method, {})
    assert first == second == train_alone(method)
