"""What a search refuses: steps that are not finite, arguments, models, losses, states."""

import math

import pytest
import torch
from small_searches import assert_same, batch, snapshot, squares, stack, started

from deltadiff import swap_
from deltadiff.diffora import Search, find_candidates
from deltadiff.errors import ArgumentError, ArgumentTypeError, NonFiniteLossError, SwapError
from deltadiff.layers.lora_layers import lora_layers


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("gate", "the validation batch of round 2"), ("inner", "training batch 3 of round 1")],
)
def test_a_loss_that_is_not_finite_stops_the_search(every, bad, kind, words):
    model = stack("ab", "ab")
    state = started(model, steps=0)
    state.log.read_every = every  # more than 1 as on a GPU, where the host reads later
    good = [("gate", 0), ("inner", 0), ("inner", 1)]
    for name, i in good:
        getattr(state, f"{name}_step")(lambda i=i: squares(model, batch(i)))
    before = snapshot(state)
    with pytest.raises(NonFiniteLossError, match=words) as stop:
        getattr(state, f"{kind}_step")(lambda: squares(model, batch(5)) * bad)
        for i in range(9):  # none of these is taken
            state.inner_step(lambda i=i: squares(model, batch(i)))
    assert str(bad) in str(stop.value)
    assert_same(snapshot(state), before)
    assert len(state.inner_losses) == 2 and len(state.gate_losses) == 1

    again = started(stack("ab", "ab"), steps=0)
    for s, m in ((state, model), (again, again.model)):
        for name, i in good if s is again else []:
            getattr(s, f"{name}_step")(lambda i=i, m=m: squares(m, batch(i)))
        s.gate_step(lambda m=m: squares(m, batch(8)))
        s.inner_step(lambda m=m: squares(m, batch(9)))
        s.check()
    assert torch.equal(state.logits, again.logits)  # it continued as if that batch had not come
    for n, p in state.trained.items():
        assert torch.equal(p, again.trained[n])


def test_a_gradient_that_is_not_finite_stops_it_too():
    model = stack("ab")
    state = started(model)
    before = snapshot(state)

    def loss():
        return (squares(model, batch(1)) * 0).sqrt()  # its derivative is infinite, times 0

    with pytest.raises(NonFiniteLossError, match="a gradient is not finite"):
        state.inner_step(loss)
    assert_same(snapshot(state), before)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ArgumentError, "r: got 0"),
        ({"lr": -1.0}, ArgumentError, "lr"),
        ({"gate_lr": math.nan}, ArgumentError, "gate_lr"),
        ({"gate_betas": (0.5, 1.0)}, ArgumentError, "betas"),
        ({"betas": 0.9}, ArgumentTypeError, "betas"),
        ({"weight_decay": -1.0}, ArgumentError, "weight_decay"),
        ({"gate_weight_decay": "no"}, ArgumentTypeError, "gate_weight_decay"),
        ({"target_modules": ["a"]}, ArgumentError, "one module in layers.0"),
        ({"modules_to_save": ["head"]}, ArgumentError, "modules_to_save"),
    ],
)
def test_a_search_that_cannot_be(options, error, words):
    model = stack("ab", "ab")
    with pytest.raises(error, match=words):
        Search(model, **options)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_searched():
    model = stack("ab")
    swap_(model, r=2)
    with pytest.raises(SwapError, match="swapped already"):
        Search(model)
    model = stack("ab", "ab")
    model.layers[1].to("meta")
    with pytest.raises(ArgumentError, match="cpu, meta"):
        Search(model)


def test_losses_that_are_none():
    model = stack("ab")
    state = started(model)
    before = snapshot(state)
    for step in (state.gate_step, state.inner_step):
        for value, words in ((1.5, "1.5"), (torch.zeros(3), r"shape \(3,\)"),
                             (torch.zeros(()), "depends on nothing")):  # fmt: skip
            with pytest.raises(ArgumentError, match=words):
                step(lambda value=value: value)
        with pytest.raises(KeyError, match="labels"):
            step(lambda: {}["labels"])
    assert_same(snapshot(state), before)
    assert all(p.requires_grad for p in state.trained.values())


def test_a_closed_search():
    state = started(stack("ab"))
    state.close()
    for call in (state.close, lambda: state.gate_step(None), lambda: state.inner_step(None)):
        with pytest.raises(SwapError, match="closed"):
            call()


def test_a_state_of_other_candidates_is_refused():
    state = started(stack("abc", "abc"))
    saved = state.state_dict()
    for names, given, wanted in (
        (("abc", "ab"), "layers.1.c", "no more candidates"),
        (("abc", "abd"), "layers.1.c", "layers.1.d"),
        (("abc", "abc", "abc"), "none", "layers.2.a"),
    ):
        other = Search(stack(*names), r=2)
        before = snapshot(other)
        with pytest.raises(ArgumentError, match=f"candidates: got {given}; accepted: {wanted}"):
            other.load_state_dict(saved)
        assert_same(snapshot(other), before)
    other = Search(stack("abc", "abc"), r=3)
    with pytest.raises(ArgumentError, match=r"layers.0.a.lora_A: got shape \(2, 6\)"):
        other.load_state_dict(saved)
    assert find_candidates(stack("abc")).layers == ("layers.0",)
