"""A run that goes on from what was saved is bit-equal to one that never stopped."""

import io
import itertools

import peft
import pytest
import torch
from delta_lora_runs import batch, make_model, make_peft_model, train
from older_states import as_older
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, save_adapter
from deltadiff.errors import ArgumentError, SwapError

ROUNDINGS = ["remainder", "stochastic", "nearest"]
FORMS = [("inplace", torch.float32, None), ("factored", torch.bfloat16, None)] + [
    ("inplace", dtype, rounding)
    for dtype, rounding in itertools.product((torch.bfloat16, torch.float16), ROUNDINGS)
]
pytestmark = pytest.mark.filterwarnings("ignore:rounding=", "ignore:PEFT's adapter files")


def optimizer_of(model, w_update, rounding, update_ratio=0.5) -> DeltaLoRA:
    return DeltaLoRA(
        model, lr=1e-2, update_ratio=update_ratio, start_step=1, w_update=w_update,
        rounding=rounding,
    )  # fmt: skip


def go_on(model, optimizer, start, stop):
    train(model, optimizer, stop - start, start=start)


def everything(model, optimizer) -> list[torch.Tensor]:
    """All of a run that a resumed one must equal bit by bit."""
    state = optimizer.state_dict()["state"]
    kept = [t for entry in state.values() for t in entry.values() if isinstance(t, torch.Tensor)]
    x = batch(9, model)[0]
    return [model(x).detach(), *(p.detach() for p in model.parameters()), *kept]


def assert_equal(one, other):
    found, wanted = everything(*one), everything(*other)
    assert len(found) == len(wanted)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def on_disk(state):
    """What `torch.load` gives of a state that `torch.save` wrote."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def load_states(model, optimizer, saved, order):
    for part in order:
        (model if part == "model" else optimizer).load_state_dict(saved[part])


@pytest.mark.parametrize("make", [make_model, make_peft_model])
@pytest.mark.parametrize(("w_update", "dtype", "rounding"), FORMS)
@pytest.mark.parametrize("order", [("model", "optimizer"), ("optimizer", "model")])
@pytest.mark.parametrize("steps", [1, 5])
def test_states_of_model_and_optimizer_in_any_order(make, w_update, dtype, rounding, order, steps):
    model, twin = make(dtype), make(dtype)
    optimizer, other = (optimizer_of(m, w_update, rounding) for m in (model, twin))
    go_on(model, optimizer, 0, steps)
    saved = on_disk({"model": model.state_dict(), "optimizer": optimizer.state_dict()})
    load_states(twin, other, saved, order)
    assert_equal((twin, other), (model, optimizer))
    go_on(model, optimizer, steps, 9)
    go_on(twin, other, steps, 9)
    assert_equal((twin, other), (model, optimizer))


@pytest.mark.parametrize(("w_update", "dtype", "rounding"), FORMS)
@pytest.mark.parametrize("steps", [1, 5])
def test_an_adapter_and_the_state_of_the_optimizer(w_update, dtype, rounding, steps, tmp_path):
    """The way of `finetune --resume`: A, B and the update from one file, W from the other."""
    model, twin = make_model(dtype), make_model(dtype)
    optimizer, other = (optimizer_of(m, w_update, rounding) for m in (model, twin))
    go_on(model, optimizer, 0, steps)
    save_adapter(model, tmp_path)
    load_adapter(twin, tmp_path)
    other.load_state_dict(on_disk(optimizer.state_dict()))
    assert_equal((twin, other), (model, optimizer))
    go_on(model, optimizer, steps, 9)
    go_on(twin, other, steps, 9)
    assert_equal((twin, other), (model, optimizer))


@pytest.mark.parametrize(("w_update", "dtype", "rounding"), FORMS)
def test_a_file_of_peft_and_the_state_of_the_optimizer(w_update, dtype, rounding, tmp_path):
    """The way of a Trainer with a PEFT model: the adapter's file, then ``optimizer.pt``."""
    model, twin = make_peft_model(dtype), make_peft_model(dtype)
    optimizer, other = (optimizer_of(m, w_update, rounding) for m in (model, twin))
    go_on(model, optimizer, 0, 5)
    model.save_pretrained(tmp_path, save_embedding_layers=False)
    saved = peft.load_peft_weights(str(tmp_path), device="cpu")
    assert not any("delta" in name for name in saved)
    peft.set_peft_model_state_dict(twin, saved)
    other.load_state_dict(on_disk(optimizer.state_dict()))
    assert_equal((twin, other), (model, optimizer))
    go_on(model, optimizer, 5, 9)
    go_on(twin, other, 5, 9)
    assert_equal((twin, other), (model, optimizer))


@pytest.mark.parametrize("make", [make_model, make_peft_model])
@pytest.mark.parametrize("w_update", ["inplace", "factored"])
@pytest.mark.parametrize("saved_at", [0, 1, 4])
def test_the_state_of_the_model_alone(make, w_update, saved_at):
    """An earlier state, loaded into a run that went on, gives the earlier outputs back."""
    model = make(torch.float64)
    optimizer = optimizer_of(model, w_update, None)
    x = batch(9, model)[0]
    go_on(model, optimizer, 0, saved_at)
    saved, y = on_disk(model.state_dict()), model(x).detach()
    go_on(model, optimizer, saved_at, 7)
    assert not torch.allclose(model(x), y)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-12, atol=1e-12)
    fresh = make(torch.float64)
    fresh.load_state_dict(saved)
    torch.testing.assert_close(fresh(x).detach(), y, rtol=1e-12, atol=1e-12)
    go_on(model, optimizer, 7, 9)  # and both train on from there
    go_on(fresh, optimizer_of(fresh, w_update, None), 0, 3)


@pytest.mark.parametrize("saved_at", [3, 5])
def test_a_state_from_before_a_change_of_lambda(saved_at):
    model = make_model(torch.float64)
    optimizer = optimizer_of(model, "factored", None)
    x = batch(9, model)[0]
    go_on(model, optimizer, 0, saved_at)
    saved, y = on_disk(model.state_dict()), model(x).detach()
    optimizer.param_groups[0]["update_ratio"] = 0.25
    go_on(model, optimizer, saved_at, 7)
    model.load_state_dict(saved)
    torch.testing.assert_close(model(x).detach(), y, rtol=1e-12, atol=1e-12)


def test_an_eager_model_refuses_a_state_with_an_update():
    model = make_model()
    go_on(model, optimizer_of(model, "factored", None), 0, 4)
    plain = make_model()
    missing = [name for name in model.state_dict() if name not in plain.state_dict()]
    assert missing and all("delta." in name for name in missing)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)
    with pytest.raises(RuntimeError, match="Unexpected key.*0.delta.anchor_A"):
        nn.Sequential(*layers).double().load_state_dict(model.state_dict())


def test_an_older_state_of_the_model_loads_strictly():
    model, older = make_model(), make_model().state_dict()
    go_on(model, optimizer_of(model, "factored", None), 0, 4)
    model.load_state_dict(older)
    x = batch(9, model)[0]
    torch.testing.assert_close(model(x), make_model()(x))


def test_a_factored_state_is_refused_while_the_optimizer_writes_into_w():
    model, other = make_model(), make_model()
    go_on(model, optimizer_of(model, "factored", None), 0, 4)
    go_on(other, optimizer_of(other, "inplace", None), 0, 4)
    before = [p.detach().clone() for p in other.parameters()]
    with pytest.raises(SwapError, match="the state of a factored run"):
        other.load_state_dict(model.state_dict())
    assert all(map(torch.equal, before, other.parameters()))


@pytest.mark.parametrize("change", ["no weights", "one less", "shape", "dtype"])
@pytest.mark.parametrize("older", [False, True])
def test_states_without_the_weights_are_refused(change, older):
    model, other = make_model(), make_model()
    optimizer, fresh = (optimizer_of(m, "inplace", None) for m in (model, other))
    go_on(model, optimizer, 0, 4)
    saved = on_disk(optimizer.state_dict())
    entries = [entry for entry in saved["state"].values() if "weight" in entry]
    for entry in entries if change == "no weights" else entries[:1]:
        w = entry.pop("weight")
        if change in ("shape", "dtype"):
            entry["weight"] = w.float() if change == "dtype" else w[1:]
    if older:
        saved = as_older(saved, optimizer)
    before = everything(other, fresh)
    with pytest.raises(ArgumentError, match="weight of 0 in state_dict"):
        fresh.load_state_dict(saved)
    assert all(map(torch.equal, before, everything(other, fresh)))
