"""Copies of a model and its optimizer, by `copy.deepcopy` or pickle, train on as the originals."""

import copy
import io
import pickle

import pytest
import torch
from delta_lora_runs import loss_of, make_model, make_peft_model, snapshot, train

from deltadiff import DeltaLoRA, FusedAdamW
from deltadiff.errors import ArgumentTypeError
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA


def by_torch_save(pair):
    file = io.BytesIO()
    torch.save(pair, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


WAYS = [copy.deepcopy, lambda pair: pickle.loads(pickle.dumps(pair)), by_torch_save]


def adalora(dtype):
    torch.manual_seed(0)
    layers = torch.nn.Linear(12, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3)
    model = torch.nn.Sequential(*layers).to(dtype)
    swap_adalora_(model, init_r=3, seed=1)
    return model, AdaLoRA(model, lr=1e-2, total_step=20, target_r=2, tinit=2, tfinal=6)


def delta_lora(kind=make_model, **options):
    def make(dtype):
        model = kind(dtype)
        return model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=2, **options)

    return make


def of_swapped(method, **options):
    def make(dtype):
        model = make_model(dtype)
        return model, method(model, lr=1e-2, **options)

    return make


METHODS = {
    "adamw": of_swapped(FusedAdamW),
    "in place": delta_lora(),
    "stochastic": delta_lora(rounding="stochastic", seed=3),
    "factored": delta_lora(w_update="factored"),
    "peft": delta_lora(make_peft_model),
    "peft, in place": delta_lora(make_peft_model, w_update="inplace"),
    "adalora": adalora,
    "dylora": of_swapped(DyLoRA, seed=5),
    "dylora, frozen": of_swapped(DyLoRA, seed=5, frozen=True, scale="alpha/r", r_min=2),
}


@pytest.mark.parametrize("way", WAYS, ids=["deepcopy", "pickle", "torch.save"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("steps", [0, 6])
def test_a_copy_trains_on_as_the_original(method, dtype, steps, way):
    model, optimizer = METHODS[method](dtype)
    train(model, optimizer, steps)
    model_2, optimizer_2 = way((model, optimizer))
    before = snapshot(model, optimizer)
    assert all(map(torch.equal, before, snapshot(model_2, optimizer_2)))

    losses = train(model_2, optimizer_2, 8, start=steps)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))  # its own tensors
    assert losses == train(model, optimizer, 8, start=steps)
    assert all(map(torch.equal, snapshot(model, optimizer), snapshot(model_2, optimizer_2)))


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_a_lambda_that_no_step_has_seen_yet(w_update):
    model, optimizer = delta_lora(w_update=w_update)(torch.float64)
    train(model, optimizer, 6)
    optimizer.param_groups[0]["update_ratio"] = 0.9
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    assert train(model, optimizer, 6, start=6) == train(model_2, optimizer_2, 6, start=6)


def test_hooks_and_a_scheduler_stay_behind():
    model, optimizer = of_swapped(FusedAdamW)(torch.float32)
    seen = []
    optimizer.register_step_post_hook(lambda own, *_: seen.append(own))
    torch.optim.lr_scheduler.StepLR(optimizer, 1)  # it replaces `step` of this very optimizer
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    before = snapshot(model, optimizer)
    train(model_2, optimizer_2, 2)
    assert not seen and all(map(torch.equal, before, snapshot(model, optimizer)))


def test_a_copy_takes_groups_and_states_of_its_own():
    model, optimizer = delta_lora()(torch.float32)
    train(model, optimizer, 3)
    saved = copy.deepcopy(optimizer.state_dict())
    model_2, optimizer_2 = copy.deepcopy((model, optimizer))
    extra = torch.nn.Parameter(torch.ones(3))
    optimizer_2.add_param_group({"params": [extra], "lr": 0.5, "update_ratio": 0.0})
    (loss_of(model_2, 3) + extra.sum()).backward()
    optimizer_2.step()
    assert (extra < 1).all() and len(optimizer.param_groups) == 1
    optimizer.load_state_dict(saved)


def test_a_shallow_copy_is_refused():
    _, optimizer = delta_lora()(torch.float32)
    with pytest.raises(ArgumentTypeError, match="copy.deepcopy"):
        copy.copy(optimizer)
