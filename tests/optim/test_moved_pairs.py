"""A and B that something else than the optimizer wrote, and what `model.to` moves."""

import copy
import itertools

import pytest
import torch
from delta_lora_runs import W_UPDATES, loss_of, make_model, make_peft_model, output, snapshot, train
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.low_rank_sum import low_rank_sum
from deltadiff.optim.delta_lora import DeltaLoRA as Optimizer


def product(layer) -> torch.Tensor:
    return (layer.lora_B @ layer.lora_A).detach()


def in_place(p, factor):
    with torch.no_grad():
        p.mul_(factor)


def through_data(p, factor):
    p.data.mul_(factor)


def other_memory(p, factor):
    p.data = p.data * factor


MOVES = [in_place, through_data, other_memory]


@pytest.mark.parametrize("make", [make_model, make_peft_model])
@pytest.mark.parametrize("move", MOVES)
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_only_steps_update_w(w_update, move, make):
    """The change of W is the sum of the steps, whatever lies between them."""
    model = make()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    layer = next(iter(optimizer._pairs.values()))
    first, told = layer.matrix.detach().clone(), 0
    for t in range(9):
        if t in (4, 6):
            move(layer.lora_B, 0.5)
        old = product(layer)
        train(model, optimizer, 1, start=t)
        told = told + (0.5 * 2.0 * (product(layer) - old) if t > 0 else 0)
    b, a = low_rank_sum("layer", [layer])
    wanted = first + told + 2.0 * product(layer)
    torch.testing.assert_close(first + b.double() @ a.double(), wanted, rtol=0, atol=1e-6)
    if w_update == "inplace":
        torch.testing.assert_close(layer.matrix.detach(), first + told, rtol=0, atol=1e-14)
    assert len(layer.delta.past_updates) == 2


@pytest.mark.parametrize("move", [in_place, other_memory])
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_pair_that_moved_is_right_before_the_next_step(w_update, move, tmp_path):
    """Outputs, states and files say the same: W stays, the pair is the new one."""
    model = make_model()
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update), 4)
    layer = model[0]
    w = layer.matrix.detach() + sum(p.B @ p.A for p in layer.delta.unwritten())
    move(layer.lora_B, 0.25)
    wanted = w + 2.0 * product(layer)
    x = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(layer(x).detach() - layer.bias, wanted.T, rtol=0, atol=1e-14)
    save_adapter(model, tmp_path)
    for other, load in (
        (make_model(), lambda m: load_adapter(m, tmp_path)),
        (make_model(), lambda m: m.load_state_dict(model.state_dict())),
    ):
        load(other)
        torch.testing.assert_close(output(other), output(model), rtol=0, atol=1e-6)


@pytest.mark.parametrize("forms", itertools.product(W_UPDATES, W_UPDATES))
def test_two_optimizers_in_turn(forms):
    """Each takes over what the other did; the files say the sum of both."""
    model = make_model()
    layer, ratios = model[0], (0.5, 0.25)
    first, told = layer.matrix.detach().clone(), 0
    both = [
        DeltaLoRA(model, lr=1e-2, update_ratio=ratio, w_update=form)
        for form, ratio in zip(forms, ratios, strict=True)
    ]
    for t in range(8):
        old, which = product(layer), t // 2 % 2
        train(model, both[which], 1, start=t)
        told = told + (ratios[which] * 2.0 * (product(layer) - old) if t not in (0, 2) else 0)
    b, a = low_rank_sum("0", [layer])
    wanted = first + told + 2.0 * product(layer)
    torch.testing.assert_close(first + b.double() @ a.double(), wanted, rtol=0, atol=1e-6)
    x = torch.eye(12, dtype=torch.float64)
    torch.testing.assert_close(layer(x).detach() - layer.bias, wanted.T, rtol=0, atol=1e-13)


def test_an_average_that_is_swapped_in_and_out_changes_nothing():
    results = []
    for averaged in (False, True):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
        train(model, optimizer, 4)
        if averaged:
            kept = [p.detach().clone() for p in model.parameters()]
            with torch.no_grad():
                for p in model.parameters():
                    p.mul_(0.9 if p.requires_grad else 1.0)
                output(model)
                for p, value in zip(model.parameters(), kept, strict=True):
                    p.copy_(value)
        train(model, optimizer, 4, start=4)
        results.append([output(model), *optimizer.state[model[0].lora_B].values()])
    assert all(map(torch.equal, *results))


def test_moves_that_cannot_be_kept_are_refused_before_anything_is_changed():
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    train(model, optimizer, 3)
    with pytest.raises(ArgumentError, match="lora_A and lora_B: .*pair of 0.* at most 8 changes"):
        for t in range(3, 20):
            in_place(model[0].lora_B, 0.9)
            before = snapshot(model, optimizer)
            train(model, optimizer, 1, start=t)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_writes_that_only_a_kernel_saw_are_said(w_update, tmp_path):
    """As on a GPU, where the host does not see what is written through ``.data``."""
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, 3)
    model[0].delta.unseen[1].fill_(1)
    with pytest.raises(SwapError, match="0: got a pair that was written through .data"):
        save_adapter(model, tmp_path)
    if w_update == "factored":
        with pytest.raises(SwapError, match="0: got a pair that was written through .data"):
            optimizer.state_dict()
    else:  # W is right, so a run can go on from it
        saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
        other = make_model()
        second = DeltaLoRA(other, lr=1e-2, update_ratio=0.5)
        other.load_state_dict(saved[0])
        second.load_state_dict(saved[1])
        assert other[0].delta.past_updates is None
        assert torch.equal(output(other), output(model))


# ------------------------------------------------------------------------- model.to


@pytest.mark.parametrize("steps", [0, 1, 4])
@pytest.mark.parametrize("dtypes", itertools.permutations([torch.float64, torch.float32], 2))
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_another_dtype_in_the_middle_of_a_run(w_update, dtypes, steps):
    """The update stays what it was, and the run goes on as one in the new dtype."""
    model = make_model(dtypes[0])
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, steps)
    before = output(model)
    model.to(dtypes[1])
    torch.testing.assert_close(output(model).double(), before.double(), rtol=0, atol=1e-5)
    train(model, optimizer, 4, start=steps)
    whole = make_model(torch.float64)
    train(whole, DeltaLoRA(whole, lr=1e-2, update_ratio=0.5, w_update=w_update), steps + 4)
    torch.testing.assert_close(output(model).double(), output(whole), rtol=0, atol=1e-3)
    moments = optimizer.state[model[0].lora_B]["exp_avg"]
    assert moments.dtype == dtypes[1] and optimizer.param_groups[0]["lr"] == 1e-2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("steps", [0, 1, 4])
def test_half_precision_in_the_middle_of_a_run(steps, w_update, dtype):
    model = make_model(torch.float32)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, steps)
    before = output(model)
    model.to(dtype)
    close = {"rtol": 0.05, "atol": 0.05}
    torch.testing.assert_close(output(model).float(), before, **close)
    train(model, optimizer, 4, start=steps)
    assert output(model).isfinite().all()


def test_a_wider_weight_gets_what_the_remainder_held():
    model = make_model(torch.bfloat16)
    optimizer = DeltaLoRA(model, lr=1e-4, update_ratio=0.5)
    train(model, optimizer, 5)
    layer = model[0]
    low = layer.delta.remainder
    bits = (layer.weight.detach().view(torch.int16).int() << 16) + low.int()
    model.float()
    assert low.any() and torch.equal(layer.weight.detach(), bits.view(torch.float32))
    train(model, optimizer, 2, start=5)
    assert layer.delta.remainder is None and "remainder" not in optimizer.state[layer.lora_B]


# --------------------------------------------------------------- groups and settings


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_lambda_may_rise_from_0(w_update):
    """Also when the groups changed meanwhile, and of a run whose lambda was 0 from the start."""
    results = []
    for first in (0.5, 0.0):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=first, w_update=w_update)
        optimizer.param_groups[0]["update_ratio"] = 0.0
        train(model, optimizer, 3)
        extra = nn.Parameter(torch.ones(2))
        optimizer.add_param_group({"params": [extra], "update_ratio": 0.0})
        optimizer.param_groups[0]["update_ratio"] = 0.5
        train(model, optimizer, 3, start=3)
        results.append((output(model), model, optimizer))
    assert torch.equal(results[0][0], results[1][0])
    # The state goes into an optimizer that was made with lambda 0.
    (_, model, optimizer), other = results[1], make_model()
    second = Optimizer(
        [{"params": other}, {"params": [nn.Parameter(torch.ones(2))]}], update_ratio=0.0,
        w_update=w_update,
    )  # fmt: skip
    other.load_state_dict(model.state_dict())
    second.load_state_dict(optimizer.state_dict())
    train(model, optimizer, 2, start=6)
    train(other, second, 2, start=6)
    assert torch.equal(output(model), output(other))


def test_lambda_does_not_rise_where_a_layer_has_dropout():
    model = nn.Sequential(nn.Linear(12, 20), nn.Linear(20, 3)).double()
    swap_(model, r=2, lora_dropout=0.5)
    optimizer = DeltaLoRA(model, update_ratio=0.0)
    optimizer.param_groups[0]["update_ratio"] = 0.5
    loss_of(model, 0).backward()
    before = snapshot(model, optimizer)
    with pytest.raises(ArgumentError, match="lora_dropout"):
        optimizer.step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize(("name", "values"), [("update_ratio", (1.0, 0.3)), ("start_step", (0, 2))])
def test_a_group_value_may_change_before_the_first_step(name, values, w_update):
    results = []
    for first in values:
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2, w_update=w_update, **{name: first})
        optimizer.param_groups[0][name] = values[-1]
        train(model, optimizer, 5)
        results.append(output(model))
    assert torch.equal(*results)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_start_step_does_not_change_once_the_update_has_begun(w_update):
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, start_step=2, w_update=w_update)
    train(model, optimizer, 5)
    optimizer.param_groups[0]["start_step"] = 0
    with pytest.raises(ArgumentError, match="start_step: got 0 after 2"):
        train(model, optimizer, 1)


def test_a_group_that_was_taken_out_is_trained_no_more():
    model = make_model()
    extra = nn.Parameter(torch.ones(2, dtype=torch.float64))
    optimizer = DeltaLoRA([{"params": model}, {"params": [extra]}], lr=1e-2)
    train(model, optimizer, 2)
    del optimizer.param_groups[1]
    extra.grad = torch.ones_like(extra)
    value = extra.detach().clone()
    train(model, optimizer, 2, start=2)
    assert torch.equal(extra, value) and extra not in optimizer.state
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))


@pytest.mark.parametrize("changes", [{"start_step": 3}, {"update_ratio": 0.25}, {"lr": 0.5}])
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_state_loads_into_a_run_with_other_settings(w_update, changes):
    model, other = make_model(), make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, w_update=w_update)
    second = DeltaLoRA(other, **{"lr": 1e-2, **changes}, w_update=w_update)
    train(model, optimizer, 4)
    train(other, second, 6)
    other.load_state_dict(model.state_dict())
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 4, start=4)
    train(other, second, 4, start=4)
    assert torch.equal(output(model), output(other))


def test_a_step_without_gradients_takes_an_update_over_and_gives_it_back():
    model = make_model()
    first = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    second = DeltaLoRA(model, lr=1e-2, update_ratio=0.25)
    before = {name: m.weight.detach().clone() for name, m in lora_layers(model).items()}
    train(model, first, 3)
    for p in model.parameters():
        p.grad = None
    second.step()
    train(model, first, 3, start=3)
    for name, layer in lora_layers(model).items():
        b, a = low_rank_sum(name, [layer])
        pair = layer.scaling * (layer.lora_B @ layer.lora_A)
        found = before[name] + b.double() @ a.double() - pair
        torch.testing.assert_close(found, layer.weight, rtol=1e-5, atol=1e-6)
