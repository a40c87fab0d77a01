"""The update of Delta-LoRA in the state of a model is read in all forms, or refused."""

import pytest
import torch
from delta_lora_runs import W_UPDATES, make_model, make_peft_model, output, train
from older_states import as_older_model

from deltadiff import DeltaLoRA

MAKERS = {"ours": make_model, "peft": make_peft_model}


def trained(make, w_update="factored", dtype=torch.float32):
    """A model with two past updates and one that goes on, and its optimizer."""
    model = make(dtype)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer, 5, ratio_at=lambda t: [0.5, 0.5, 0.75, 0.75, 0.25][t])
    return model, optimizer


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS)
def test_older_states_are_read(make, w_update):
    model, _ = trained(make, w_update)
    state = model.state_dict()
    older = as_older_model(state)
    changed = older.keys() ^ state.keys()
    assert len([key for key in changed if "past_A." in key]) == 2 * 2  # of two layers
    fresh, same = make(torch.float32), make(torch.float32)
    fresh.load_state_dict(older)
    same.load_state_dict(state)
    assert torch.equal(output(fresh), output(model))
    ours, theirs = fresh.state_dict(), same.state_dict()
    assert ours.keys() == state.keys()
    assert all(torch.equal(t, theirs[key]) for key, t in ours.items())
