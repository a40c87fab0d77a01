"""``target_modules``: the layers that each kind of target names, and the errors."""

import pytest
import torch
from torch import nn
from two_blocks import Model

from deltadiff import LoraLinear, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.layers.targets.choose import choose_modules


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


class Experts(nn.Module):
    def __init__(self):
        super().__init__()
        self.down_proj = nn.Parameter(torch.zeros(2, 8, 8))


def mixed() -> nn.Module:
    """Beside linear layers: an embedding, a convolution, experts, and a layer with a hook."""
    model = nn.ModuleDict({"embed": nn.Embedding(10, 8), "experts": Experts()})
    model["conv"] = nn.ModuleDict({"proj": nn.Conv1d(8, 8, 1)})
    model["attn"] = nn.ModuleDict({"proj": nn.Linear(8, 8), "hooked": nn.Linear(8, 8)})
    model["shared"] = nn.ModuleDict({"down_proj": nn.Linear(8, 8)})
    model["attn"]["hooked"].register_forward_hook(lambda *args: None)
    return model


@pytest.mark.parametrize(
    ("targets", "words"),
    [
        (["attn.proj", "embed"], "'embed', which names embed: an embedding"),
        (["proj"], "'proj', which names conv.proj: a convolution"),
        (["down_proj"], r"experts.down_proj: experts \(2, 8, 8\), not an nn.Linear"),
        (["experts"], "names experts: experts"),
        (["attn.proj", "hooked"], "names attn.hooked: hooks on it"),
        (r"attn\..*", "names attn.hooked: hooks on it"),
        (r".*proj", "names experts.down_proj: experts"),
        (lambda name, module: name.startswith("attn"), "names attn.hooked: hooks on it"),
    ],
)
def test_targets_that_name_what_cannot_be_taken(targets, words):
    model = mixed()
    with pytest.raises(ArgumentTypeError, match=f"target_modules: got .*{words}"):
        swap_(model, r=2, target_modules=targets)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize(
    "targets", ["all-linear", ["attn.proj", "shared.down_proj"], r"(attn\.proj|shared.*)"]
)
def test_longer_names_leave_it_out(targets):
    report = swap_(mixed(), r=2, target_modules=targets)
    assert [row.module for row in report.rows] == ["attn.proj", "shared.down_proj"]


def test_what_may_get_a_pair_is_listed_also_on_meta():
    """DiffoRA's candidates: a function that asks for all gets all that can be taken."""
    for model in (mixed(), mixed().to("meta")):
        for targets in ("all-linear", lambda name, module: True):
            assert list(choose_modules(model, targets)) == ["attn.proj", "shared.down_proj"]


def test_modules_to_save_are_no_targets():
    model = mixed()
    swap_(model, r=2, target_modules=["proj"], modules_to_save=["conv"])
    assert type(model["conv"]["proj"]) is nn.Conv1d and model["conv"]["proj"].weight.requires_grad
