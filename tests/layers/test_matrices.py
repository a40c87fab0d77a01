"""The weights of a model: each once, under which name, and what it stands for."""

import pytest
import torch
from torch import nn
from two_blocks import peft_model

from deltadiff import swap_
from deltadiff.layers.matrices import find_matrices, quantised_shape, size_of


def listed(model: nn.Module) -> dict[str, tuple[int, ...]]:
    return {m.name: m.shape for m in find_matrices(model)}


def test_vectors_and_pairs_are_none_of_them():
    model = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.Conv1d(6, 2, 3))
    found = {"0": (6, 4), "2": (2, 6, 3)}
    assert listed(model) == found
    swap_(model, r=2)
    assert listed(model) == found


def test_a_parameter_of_the_model_itself_and_of_a_module():
    model = nn.Module()
    model.table, model.inner = nn.Parameter(torch.zeros(2, 3)), nn.Module()
    model.inner.table = nn.Parameter(torch.zeros(3, 2, 1))
    assert listed(model) == {"table": (2, 3), "inner.table": (3, 2, 1)}


def test_tied_and_shared_weights_are_listed_once():
    model = nn.ModuleDict({"a": nn.Embedding(5, 4), "b": nn.Linear(4, 5, bias=False)})
    model["b"].weight, model["c"] = model["a"].weight, model["b"]
    (matrix,) = find_matrices(model)
    assert (matrix.name, matrix.tied, matrix.elements) == ("a", ["b"], 20)


def test_what_peft_adds_is_none_of_the_models_weight():
    found = find_matrices(peft_model(modules_to_save=["head"]))
    assert {m.name.partition("model.")[2].partition(".modules")[0] for m in found} == {
        "model.layers.0.q_proj", "model.layers.0.v_proj", "model.layers.1.q_proj",
        "model.layers.1.v_proj", "model.head",
    }  # fmt: skip
    assert sum(m.in_peft for m in found) == 4


class Packed(nn.Module):
    """As layers of AWQ, GPTQ and HQQ are: two sizes, and bytes in buffers."""

    def __init__(self, out_name: str, in_name: str):
        super().__init__()
        setattr(self, out_name, 6)
        setattr(self, in_name, 8)
        self.register_buffer("qweight", torch.zeros(1, 6, dtype=torch.int32))


@pytest.mark.parametrize("names", [("out_features", "in_features"), ("outfeatures", "infeatures")])
def test_a_quantised_layer_that_is_no_linear_counts_by_its_sizes(names):
    assert quantised_shape(Packed(*names)) == (6, 8)
    assert listed(nn.ModuleDict({"q": Packed(*names)})) == {"q": (6, 8)}


def test_other_modules_are_not_taken_for_quantised_ones():
    own = nn.Module()
    own.out_features, own.in_features, own.weight = 6, 8, nn.Parameter(torch.zeros(6, 8))
    for module in (own, nn.Conv1d(2, 2, 1), torch.compile(nn.Linear(2, 2), backend="eager")):
        assert quantised_shape(module) is None


def test_a_lazy_layer_has_no_size_yet():
    lazy = nn.LazyLinear(3)
    assert size_of(lazy.weight) == 0 and find_matrices(nn.Sequential(lazy))[0].elements == 0


def test_a_scripted_layer():
    assert listed(nn.Sequential(torch.jit.script(nn.Linear(3, 2)))) == {"0": (2, 3)}
