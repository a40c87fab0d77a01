"""What a swapped model carries beside its layers."""

import copy

import pytest
from torch import nn

from deltadiff import merge_, swap_, unswap_
from deltadiff.layers.model_notes import note_selection, noted_selection


@pytest.mark.parametrize("end", [unswap_, merge_])
def test_notes_go_with_a_copy_and_end_with_the_layers(end):
    model = nn.Sequential(nn.Linear(4, 4))
    attributes, names = set(vars(model)), set(model.state_dict())
    assert noted_selection(model) is None
    swap_(model, r=2)
    note_selection(model, {"layers": {}})
    assert set(model.state_dict()) == names | {"0.lora_A", "0.lora_B"}
    for swapped in (copy.deepcopy(model), model):
        assert noted_selection(swapped) == {"layers": {}}
        end(swapped)
        assert noted_selection(swapped) is None and set(vars(swapped)) == attributes
