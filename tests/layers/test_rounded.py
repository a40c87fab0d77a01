"""Files that hold the updates of a rounded W as factors say that they are not quite this W."""

import warnings

import pytest
import torch
from delta_lora_runs import make_model, train

from deltadiff import DeltaLoRA, export_peft, save_adapter

pytestmark = pytest.mark.filterwarnings("ignore:rounding=")


def trained(rounding, dtype=torch.bfloat16, steps=6):
    model = make_model(dtype)
    options = {"lr": 1e-2, "update_ratio": 0.5, "w_update": "inplace", "rounding": rounding}
    train(model, DeltaLoRA(model, **options), steps)
    return model


@pytest.mark.parametrize("write", [save_adapter, export_peft])
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_a_rounded_w(rounding, write, tmp_path):
    model = trained(rounding)
    told = (
        r"W of \d layers, 0 among them, was rounded in each step.*`model.state_dict\(\)`.*`merge_`"
    )
    with pytest.warns(UserWarning, match=told):
        write(model, tmp_path)
    other = trained(rounding, steps=0)
    other.load_state_dict(model.state_dict())  # which the warning names
    assert torch.equal(other[0].weight, model[0].weight)


@pytest.mark.parametrize("write", [save_adapter, export_peft])
@pytest.mark.parametrize(
    ("rounding", "dtype", "steps"),
    [
        ("remainder", torch.bfloat16, 6),
        (None, torch.float32, 6),
        ("nearest", torch.float32, 6),
        ("nearest", torch.bfloat16, 1),
    ],
)
def test_nothing_to_say(rounding, dtype, steps, write, tmp_path):
    model = trained(rounding, dtype, steps)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        write(model, tmp_path)
