"""What the names of an exported adapter match, by PEFT's own rules."""

import peft
import pytest
from peft.tuners.tuners_utils import check_target_module_exists
from peft.utils.other import get_pattern_key

from deltadiff.layers.peft_files.names import look_up, pattern_of, target_modules

MODULES = [
    "q_proj", "layers", "layers.0", "layers.0.q_proj", "layers.10.q_proj", "head", "aux.head",
    "decoder.layers.0.q_proj", "decoder.layers.0.v_proj", "aux.xhead", "blocks.a-b", "blocks.a+b",
]  # fmt: skip


@pytest.mark.parametrize(
    "layers",
    [
        ["q_proj"], ["layers.0.q_proj"], ["layers.10.q_proj"], ["head"], ["aux.head", "head"],
        ["layers.0.q_proj", "decoder.layers.0.q_proj"], ["q_proj", "decoder.layers.0.v_proj"],
        ["blocks.a+b", "head"], ["aux.xhead"],
    ],
)  # fmt: skip
def test_the_targets_are_these_layers_and_no_others(layers):
    targets = target_modules(layers, MODULES)
    config = peft.LoraConfig(target_modules=targets)
    assert [name for name in MODULES if check_target_module_exists(config, name)] == [
        name for name in MODULES if name in layers
    ]
    # A regular expression is only taken where the names would match others.
    plain = peft.LoraConfig(target_modules=layers)
    exact = all(
        not check_target_module_exists(plain, name) for name in MODULES if name not in layers
    )
    assert isinstance(targets, list) == exact


@pytest.mark.parametrize("default", [1, 2])
def test_each_layer_has_its_own_value(default):
    values = {name: 1 + i % 3 for i, name in enumerate(MODULES)}
    pattern = pattern_of(values, default)
    for name, value in values.items():
        assert pattern.get(get_pattern_key(pattern.keys(), name), default) == value
        assert look_up(pattern, name, default) == value


def test_a_pattern_has_plain_names_where_they_are_enough():
    values = {"layers.0.q_proj": 1, "layers.10.q_proj": 2, "head": 2}
    assert pattern_of(values, 2) == {"layers.0.q_proj": 1}
    assert pattern_of({"q_proj": 1, "layers.0.q_proj": 2}, 2) == {"^q_proj": 1}
    assert pattern_of(values, 1) == {"layers.10.q_proj": 2, "head": 2}
