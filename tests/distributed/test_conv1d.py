"""GPT-2 under FSDP2, which splits the weight (in, out) of a Conv1D along its inputs."""

import copy

import pytest
import torch
import transformers
from fsdp_runs import METHODS, train, values
from ranks import run_ranks, short_form
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard

from deltadiff import DeltaLoRA, merge_, swap_
from deltadiff.errors import ArgumentError

FULL = StateDictOptions(full_state_dict=True)


def make(dtype, sharded):
    torch.manual_seed(0)
    config = transformers.GPT2Config(
        vocab_size=96, n_embd=44, n_layer=2, n_head=4, n_positions=16, bos_token_id=0,
        eos_token_id=0, use_cache=False, attn_pdrop=0.0, resid_pdrop=0.0, embd_pdrop=0.0,
    )  # fmt: skip
    model = transformers.GPT2LMHeadModel(config).to(dtype)
    swap_(model, r=6, seed=1)
    if sharded:
        for block in model.transformer.h:
            fully_shard(block)
        fully_shard(model)
    return model


def run(method, sharded):
    dtype, how = METHODS[method]
    model = make(dtype, sharded)
    return model, DeltaLoRA(model, lr=5e-3, **how)


def train_and_merge(rank, method):
    """The values after some steps, after more steps of a resumed run, and merged."""
    model, optimizer = run(method, True)
    train(model, optimizer, rank, steps=3)
    found = [values(model)]
    of_model, of_optimizer = copy.deepcopy(get_state_dict(model, optimizer, options=FULL))
    for load in (set_optimizer_state_dict, load_whole):
        model, optimizer = run(method, True)
        set_model_state_dict(model, of_model, options=FULL)
        load(model, optimizer, of_optimizer, options=FULL)
        train(model, optimizer, rank, steps=3)
        found.append(values(model))
    merge_(model)
    return [*found, values(model)]


def load_whole(model, optimizer, state, options):
    """The optimizer's own call, with whole tensors in the state."""
    groups = [{**group, "params": list(group["params"])} for group in state["param_groups"]]
    optimizer.load_state_dict({"state": state["state"], "param_groups": groups})


TAKEN = [method for method in METHODS if method != "stochastic"]


@pytest.mark.filterwarnings("ignore:.*rounding")
@pytest.mark.parametrize("method", short_form(TAKEN, "remainder"))
def test_two_processes_are_one_bit_by_bit(method):
    model, optimizer = run(method, False)
    train(model, optimizer, steps=3)
    expected = [values(model)]
    train(model, optimizer, steps=3)
    expected += [values(model)] * 2
    merge_(model)
    expected.append(values(model))
    assert run_ranks(train_and_merge, method) == [expected] * 2


def refuse(rank):
    model = make(torch.bfloat16, True)
    with pytest.raises(ArgumentError, match="rounding: got 'stochastic' for .*Conv1D.*inputs"):
        DeltaLoRA(model, rounding="stochastic")
    DeltaLoRA(make(torch.float32, True), rounding="stochastic")  # which rounds nothing
    return True


def test_random_bits_along_the_inputs_are_refused():
    assert run_ranks(refuse) == [True] * 2
