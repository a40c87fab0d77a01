"""``target_modules``: the layers that each kind of target names, and the errors."""

import pytest
from two_blocks import Model

from deltadiff import LoraLinear, swap_
from deltadiff.errors import ArgumentError


@pytest.mark.parametrize(
    ("targets", "count"),
    [
        ("all-linear", 4),
        (["q_proj"], 2),
        (("q_proj", "layers.1.v_proj"), 3),
        (r"layers\.1\..*", 2),
        (lambda name, module: module.bias is None, 2),
        (["head"], 1),
    ],
)
def test_targets(targets, count):
    assert len(swap_(Model(), r=2, target_modules=targets).rows) == count


@pytest.mark.parametrize("targets", [["q_prj"], "q_prj", [], lambda name, module: False, ["norm"]])
def test_targets_that_match_nothing_list_near_names(targets):
    model = Model()
    with pytest.raises(ArgumentError, match="target_modules.*near ones: .*q_proj"):
        swap_(model, r=2, target_modules=targets)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


def test_each_name_has_to_match():
    with pytest.raises(ArgumentError, match="'k_proj'"):
        swap_(Model(), r=2, target_modules=["q_proj", "k_proj"])
