"""The gates of a search: equation 11, and the memory that they stay in."""

import math

import pytest
import torch
from small_searches import batch, squares, stack, started

from deltadiff.diffora import Search


def test_gates_are_a_softmax_over_the_modules_of_one_layer():
    state = Search(stack("ab", "bca"), r=2)
    assert state.logits.shape == (2, 3) and state.logits.dtype == torch.float32
    assert state.gates().values == ((0.5, 0.5, None), pytest.approx((1 / 3,) * 3, abs=1e-7))
    rows = [[0.3, -1.2, 0.0], [2.0, 0.5, -0.7]]  # the first layer has no "c": its logit stays 0
    with torch.no_grad():
        state.logits.copy_(torch.tensor(rows))
        state.load_state_dict(state.state_dict())
    (a, b, none), second = state.gates().values
    whole = math.exp(0.3) + math.exp(-1.2)
    assert none is None
    assert (a, b) == pytest.approx((math.exp(0.3) / whole, math.exp(-1.2) / whole), rel=1e-6)
    whole = sum(map(math.exp, rows[1]))
    assert second == pytest.approx([math.exp(v) / whole for v in rows[1]], rel=1e-6)


def test_gates_of_inner_steps_stay_in_one_place():
    """A captured inner step can then see the gates of later rounds."""
    model = stack("ab")
    state = started(model)
    layer = state.layers["layers.0.a"]
    place, value = layer.gate.data_ptr(), layer.gate.item()
    state.gate_step(lambda: squares(model, batch(9)))
    assert layer.gate.data_ptr() == place and layer.gate.item() != value
