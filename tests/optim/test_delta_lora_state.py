"""What a `DeltaLoRA` run leaves: its state dict, and what a second run takes over."""

import copy
import io

import pytest
import torch
from delta_lora_runs import W_UPDATES, loss_of, make_model, output, snapshot, train, trainable
from older_states import as_older

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, SwapError


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_resumes_exactly(w_update, dtype):
    def fresh():
        model = make_model(dtype)
        options = {"rounding": "stochastic"} if dtype == torch.bfloat16 else {}
        return model, DeltaLoRA(
            model, lr=1e-2, update_ratio=1.0, start_step=2, w_update=w_update, **options
        )

    def lr_at(t):
        return 1e-2 / (1 + t)

    model, optimizer = fresh()
    train(model, optimizer, 12, lr_at=lr_at)
    for cut in (1, 3, 7):
        first, first_optimizer = fresh()
        train(first, first_optimizer, cut, lr_at=lr_at)
        file = io.BytesIO()
        torch.save([first.state_dict(), first_optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        second, second_optimizer = fresh()
        second.load_state_dict(weights)
        second_optimizer.load_state_dict(state)
        assert torch.equal(output(second), output(first))
        train(second, second_optimizer, 12 - cut, start=cut, lr_at=lr_at)
        assert torch.equal(output(second), output(model))


def train_after_reloading(model, w_update, reload: bool) -> torch.Tensor:
    """The output after four steps of an optimizer that may have loaded its own state before."""
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update=w_update)
    if reload:  # as accelerate does when it prepares an optimizer
        optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    train(model, optimizer, 4)
    return output(model)


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_state_from_before_the_first_step(w_update, dtype):
    runs = [train_after_reloading(make_model(dtype), w_update, reload) for reload in (True, False)]
    assert torch.equal(*runs)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_state_from_before_the_first_step_keeps_a_loaded_adapter(w_update, tmp_path):
    earlier = make_model()
    train(earlier, DeltaLoRA(earlier, lr=1e-2, update_ratio=1.0), 3)
    save_adapter(earlier, tmp_path)
    runs = []
    for reload in (True, False):
        model = make_model()
        load_adapter(model, tmp_path)
        runs.append(train_after_reloading(model, w_update, reload))
    # Loading moves the adapter's update into W, which rounds otherwise than the first forward pass.
    torch.testing.assert_close(*runs, rtol=1e-9, atol=1e-12)


def test_a_state_from_before_the_first_step_takes_back_what_was_done():
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update="factored")
    weights, state = copy.deepcopy(model.state_dict()), copy.deepcopy(optimizer.state_dict())
    before = output(model)
    train(model, optimizer, 4, ratio_at=lambda t: 1.0 + t)
    model.load_state_dict(weights)
    optimizer.load_state_dict(state)
    assert torch.equal(output(model), before)


def test_remainder_is_saved_with_the_state():
    model = make_model(torch.bfloat16)
    optimizer = DeltaLoRA(model, lr=1e-4, update_ratio=0.1)
    train(model, optimizer, 5)
    low = optimizer.state[model[0].lora_B]["remainder"]
    assert low.dtype == torch.int16 and low.any()
    other = make_model(torch.bfloat16)
    second = DeltaLoRA(other, lr=1e-4, update_ratio=0.1)
    second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[other[0].lora_B]["remainder"], low)


def test_foreign_state_dict_is_refused():
    model = make_model()
    optimizer = DeltaLoRA(model)
    train(model, optimizer, 3)
    before = snapshot(model, optimizer)
    adamw = torch.optim.AdamW(trainable(model))
    other = DeltaLoRA(make_model(), w_update="factored")
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["exp_avg"] = torch.zeros(1)
    unknown = copy.deepcopy(optimizer.state_dict())
    unknown["state"][99] = {}
    older = as_older(copy.deepcopy(optimizer.state_dict()), optimizer)
    older["state"]["delta_lora"]["folded"][99] = []
    for state in (adamw.state_dict(), other.state_dict(), bad, unknown, older):
        with pytest.raises(ArgumentError, match="state_dict"):
            optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


@pytest.mark.parametrize("first", W_UPDATES)
@pytest.mark.parametrize("second", W_UPDATES)
def test_a_second_run_keeps_what_the_first_one_did(first, second):
    model = make_model()
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update=first), 10)
    before = output(model)
    optimizer = DeltaLoRA(model, lr=1e-9, weight_decay=0, update_ratio=0.5, w_update=second)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=0)


def test_a_second_run_keeps_the_remainder_of_the_first():
    model = make_model(torch.bfloat16)
    train(model, DeltaLoRA(model, lr=1e-4, update_ratio=0.1), 5)
    low = model[0].delta.remainder.clone()
    optimizer = DeltaLoRA(model, lr=0.0, weight_decay=0, update_ratio=0.1)
    train(model, optimizer, 3)
    assert low.any() and torch.equal(optimizer.state[model[0].lora_B]["remainder"], low)


@pytest.mark.parametrize("way_on", ["inplace", "merge"])
def test_a_run_that_would_lose_the_factored_update_before_it_is_refused(way_on):
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.1)
    for change in range(12):  # more values of lambda than are kept as factors
        optimizer.param_groups[0]["update_ratio"] = 0.1 + 0.05 * change
        train(model, optimizer, 2)
    assert model[0].delta.past_updates is None
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored"), 5)
    before = output(model)

    third = DeltaLoRA(model, lr=1e-9, weight_decay=0, update_ratio=0.5, w_update="factored")
    tensors = snapshot(model, third)
    loss_of(model, 0).backward()
    with pytest.raises(SwapError, match="0.*`merge_` and `swap_`"):
        third.step()
    saved = third.state_dict()
    saved["param_groups"][0]["lr"] = 0.5
    with pytest.raises(SwapError, match="0.*`merge_` and `swap_`"):
        third.load_state_dict(saved)
    assert third.param_groups[0]["lr"] == 1e-9
    assert all(map(torch.equal, tensors, snapshot(model, third)))
    assert torch.equal(output(model), before)

    if way_on == "merge":
        merge_(model)
        swap_(model, r=2)
    third = DeltaLoRA(model, lr=1e-9, weight_decay=0, update_ratio=0.5, w_update="inplace")
    third.zero_grad()
    loss_of(model, 0).backward()
    third.step()
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=0)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_ratio_that_no_step_has_seen_is_in_force_after_loading(w_update):
    """Also in an optimizer whose last step had that ratio already."""
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["update_ratio"] = 1.0
    saved = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    train(model, optimizer, 2, start=3)
    wanted = output(model)
    model.load_state_dict(saved[0])
    optimizer.load_state_dict(saved[1])
    train(model, optimizer, 2, start=3)
    assert torch.equal(output(model), wanted)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_an_update_that_has_ended_is_loaded_where_none_began(w_update):
    """Both lambdas are 0 by then, so nothing but the state says that there is an update."""
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update=w_update)
    train(model, optimizer, 3)
    optimizer.param_groups[0]["update_ratio"] = 0.0
    train(model, optimizer, 2, start=3)
    saved = copy.deepcopy((optimizer.state_dict(), [p.detach() for p in trainable(model)]))
    other = make_model()
    other_optimizer = DeltaLoRA(other, lr=1e-2, update_ratio=0.0, w_update=w_update)
    other_optimizer.load_state_dict(saved[0])
    with torch.no_grad():
        for p, value in zip(trainable(other), saved[1], strict=True):
            p.copy_(value)
    assert torch.equal(output(other), output(model))
    for one, its in ((model, optimizer), (other, other_optimizer)):
        train(one, its, 2, start=5)
    assert torch.equal(output(other), output(model))
