"""The warning about what round-to-nearest loses of an update of W."""

import pytest
import torch
from delta_lora_runs import make_model, train

from deltadiff import DeltaLoRA


def test_nearest_warns_once_with_the_share_lost():
    model = make_model(torch.bfloat16)
    optimizer = DeltaLoRA(model, lr=1e-5, update_ratio=1.0, rounding="nearest")
    with pytest.warns(UserWarning, match=r"lost \d+\.\d% of the first weight update") as caught:
        train(model, optimizer, 10)
    assert len(caught) == 1
