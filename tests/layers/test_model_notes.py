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


@pytest.mark.parametrize("inner_first", [False, True])
def test_a_model_and_a_part_of_it_that_were_both_swapped(inner_first):
    model = nn.Sequential(nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), nn.Linear(4, 4))
    model[1].bias.requires_grad_(False)
    before = [p.requires_grad for p in model.parameters()]
    calls = [(model[0], ["1"]), (model, ["0.0"])]
    for part, targets in calls if inner_first else calls[::-1]:
        swap_(part, r=2, target_modules=targets)
    unswap_(model)
    assert [p.requires_grad for p in model.parameters()] == before


def test_notes_are_found_inside_and_outside_of_a_wrapper():
    model = nn.Sequential(nn.Linear(4, 4))
    wrapped = nn.DataParallel(model)
    swap_(wrapped, r=2)
    note_selection(wrapped, {"layers": {}})
    assert noted_selection(model) == noted_selection(wrapped) == {"layers": {}}
    unswap_(wrapped)
    assert noted_selection(model) is None and all(p.requires_grad for p in model.parameters())
