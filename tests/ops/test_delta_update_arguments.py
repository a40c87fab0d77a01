"""Arguments that `delta_update_` refuses, by name, before it changes anything."""

import pytest
import torch
from delta_update_calls import remainder_like

from deltadiff import delta_update_
from deltadiff.errors import ArgumentError, ArgumentTypeError

BF16, F16 = torch.bfloat16, torch.float16


def good_arguments():
    ws = [torch.ones(6, 8, dtype=BF16) for _ in range(2)]
    return {
        "weight": ws,
        "lora_A": [torch.ones(2, 8)] * 2, "lora_B": [torch.ones(6, 2)] * 2,
        "delta_A": [torch.ones(2, 8)] * 2, "delta_B": [torch.ones(6, 2)] * 2,
        "scale": 1.0, "rounding": "remainder", "remainder": [remainder_like(w) for w in ws],
    }  # fmt: skip


@pytest.mark.parametrize(
    "change, argument, kind",
    [
        ({"lora_A": [torch.ones(2, 8), torch.ones(2, 7)]}, "lora_A", ArgumentError),
        ({"lora_A": [torch.ones(2, 8), torch.ones(0, 8)]}, "lora_A", ArgumentError),
        ({"lora_A": [torch.ones(2, 8)]}, "lora_A", ArgumentError),
        ({"lora_B": [torch.ones(6, 2), torch.ones(6, 3)]}, "lora_B", ArgumentError),
        ({"lora_B": [torch.ones(6, 2, dtype=F16)] * 2}, "lora_B", ArgumentTypeError),
        ({"delta_A": [torch.ones(2, 8, dtype=BF16)] * 2}, "delta_A", ArgumentTypeError),
        ({"delta_B": [torch.ones(6, 2), torch.ones(5, 2)]}, "delta_B", ArgumentError),
        ({"delta_B": [torch.ones(6, 2), None]}, "delta_B", ArgumentTypeError),
        ({"scale": [1.0]}, "scale", ArgumentError),
        ({"scale": [1.0, float("nan")]}, "scale", ArgumentError),
        ({"rounding": "up"}, "rounding", ArgumentError),
        ({"rounding": None, "remainder": None}, "rounding", ArgumentError),
        ({"rounding": "none"}, "rounding", ArgumentError),
        ({"remainder": None}, "remainder", ArgumentError),
        ({"remainder": [torch.zeros(6, 8, dtype=BF16)] * 2}, "remainder", ArgumentTypeError),
        ({"seed": 1.5}, "seed", ArgumentTypeError),
        ({"seed": 2**63}, "seed", ArgumentError),
        ({"step": torch.tensor(1.0)}, "step", ArgumentTypeError),
        ({"step": torch.tensor([1])}, "step", ArgumentError),
        ({"apply": torch.tensor([True])}, "apply", ArgumentError),
        ({"backend": "cuda"}, "backend", ArgumentError),
    ],
)
def test_bad_input_is_named_and_nothing_changed(change, argument, kind):
    arguments = good_arguments() | change
    with pytest.raises(kind) as raised:
        delta_update_(**arguments)
    assert raised.value.argument == argument
    assert all((w == 1).all() for w in arguments["weight"])
    assert not any(low.any() for low in arguments["remainder"] or [])


@pytest.mark.parametrize(
    "other", [torch.ones(6, 8), torch.ones(0, 8, dtype=BF16)], ids=["float32", "empty"]
)
def test_weights_of_two_kinds_are_refused(other):
    weights = [torch.ones(6, 8, dtype=BF16), other]
    with pytest.raises(ArgumentError) as raised:
        delta_update_(**good_arguments() | {"weight": weights})
    assert raised.value.argument == "weight" and (weights[0] == 1).all()
