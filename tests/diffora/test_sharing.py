"""Stage 2 of DiffoRA: who shares a pair, warm starts, and what is refused."""

import copy

import pytest
import torch
from shared_pairs import blocks, select
from small_models import ARCHITECTURES, build, loss_of
from torch import nn

from deltadiff.diffora import Search, apply_, find_candidates, random_selection, selection_of
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_selected_modules_have_their_own_pair_and_the_others_share_by_type(name):
    model = build(name)
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    report = apply_(model, selection, r=3, lora_alpha=6, share_r=2, seed=0)
    layers, candidates = lora_layers(model), selection.candidates
    assert set(layers) == set(candidates.places)
    pairs: dict[str, set] = {}
    for whole, (_, j) in candidates.places.items():
        layer = layers[whole]
        if whole in selection.selected:
            assert (layer.r, layer.scaling, layer.share_group) == (3, 2.0, None)
        else:
            assert (layer.r, layer.scaling) == (2, 3.0)
            assert layer.share_group == candidates.types[j]
            pairs.setdefault(layer.share_group, set()).add((layer.lora_A, layer.lora_B))
    assert pairs and all(len(found) == 1 for found in pairs.values())
    own = {p for n in selection.selected for p in (layers[n].lora_A, layers[n].lora_B)}
    assert len(own) == 2 * len(selection.selected)
    trained = {p for p in model.parameters() if p.requires_grad}
    shared = {p for found in pairs.values() for pair in found for p in pair}
    assert trained == own | shared
    assert report.trainable == sum(p.numel() for p in trained)
    for row in report.rows:
        assert row.shares == (layers[row.module].share_group or "")
    assert f"{candidates.types[0]}" in str(report) and "shares its pair in" in str(report)
    assert report.notes == () and selection_of(model) == selection


def test_without_sharing_the_others_are_frozen():
    model = build("bert")
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    report = apply_(model, selection, share=False)
    assert set(lora_layers(model)) == selection.selected
    assert "9 modules were not selected and are frozen" in str(report)
    assert "shares its pair" not in str(report)
    everything_selected = random_selection(find_candidates(build("bert")), 1.0)
    assert len(apply_(build("bert"), everything_selected).rows) == 18


def test_a_group_of_different_shapes_is_split_and_the_report_says_so():
    model = blocks("ab", "ab", "ab", "ab", hidden=[9, 9, 12, 12])
    chosen = [f"layers.{i}.a" for i in range(4)]
    report = apply_(model, select(model, *chosen))
    layers = lora_layers(model)
    groups = {n: layer.share_group for n, layer in layers.items() if layer.share_group}
    assert groups["layers.0.hidden"] == groups["layers.1.hidden"] == "hidden (9 x 6)"
    assert groups["layers.2.hidden"] == groups["layers.3.hidden"] == "hidden (12 x 6)"
    assert {groups[f"layers.{i}.b"] for i in range(4)} == {"b"}
    assert layers["layers.0.hidden"].lora_B is layers["layers.1.hidden"].lora_B
    assert layers["layers.0.hidden"].lora_A is not layers["layers.2.hidden"].lora_A
    assert report.notes == ("hidden: 2 shared pairs, for weights of 9 x 6; 12 x 6",)
    assert str(report).endswith(report.notes[0])


def test_weights_of_other_dtypes_do_not_share():
    model = blocks("ab", "ab", "ab")
    model.layers[2].to(torch.bfloat16)
    report = apply_(model, select(model, *[f"layers.{i}.a" for i in range(3)]))
    layers = lora_layers(model)
    assert layers["layers.0.b"].lora_A is layers["layers.1.b"].lora_A
    assert layers["layers.2.b"].share_group == "b (bfloat16)"
    assert report.notes == ("b: 2 shared pairs, for weights of float32; bfloat16",)


def test_two_stacks_do_not_share():
    model = nn.Module()
    model.encoder, model.decoder = blocks("ab", "ab"), blocks("ab", "ab")
    report = apply_(model, random_selection(find_candidates(model), 0.5, seed=3))
    assert {row.shares for row in report.rows if row.shares} <= {
        f"{s}.layers.*.{t}" for s in ("encoder", "decoder") for t in "ab"
    }
    pairs = {}
    for name, layer in lora_layers(model).items():
        if layer.share_group:
            pairs.setdefault(layer.lora_A, set()).add(name.split(".")[0])
    assert pairs and all(len(stacks) == 1 for stacks in pairs.values())


def test_a_warm_start_computes_what_the_search_computed():
    model = blocks("ab", "ab", dtype=torch.float64)
    x = torch.randn(5, 6, dtype=torch.float64)
    search = Search(model, r=2, lora_alpha=6, lr=1e-2, seed=0)
    for _ in range(4):
        search.inner_step(lambda: model(x).square().mean())
        search.gate_step(lambda: (model(x) - 1).square().mean())
    selection = search.gates().discretise(1.0)
    y = model(x).detach()
    search.close()
    assert not torch.allclose(model(x), y)
    apply_(model, selection, r=2, lora_alpha=4, warm_start=search)  # another scaling, same layer
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=0)


def test_a_warm_start_is_for_selected_modules_and_heads():
    model = build("bert")
    search = Search(model, r=2, lr=1e-2, seed=0, modules_to_save=["classifier"])
    for _ in range(3):
        search.inner_step(lambda: loss_of(model, range(8)))
    selection = search.gates().discretise(0.5)
    search.close()
    fresh, head = copy.deepcopy(model), model.classifier.weight.detach().clone()
    apply_(model, selection, r=2, warm_start=search, modules_to_save=["classifier"], seed=9)
    for name, layer in lora_layers(model).items():
        assert layer.lora_B.any() == (name in selection.selected)
    assert torch.equal(model.classifier.weight, search.heads["classifier.weight"])
    apply_(fresh, selection, r=2, modules_to_save=["classifier"])  # the paper's way
    assert not any(layer.lora_B.any() for layer in lora_layers(fresh).values())
    assert torch.equal(fresh.classifier.weight, head)


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ArgumentError, "r: got 0"),
        ({"r": 7}, ArgumentError, r"r: got 7; accepted: 1 to 6, .*layers.0.a"),
        ({"r": 2.0}, ArgumentTypeError, "r: got 2.0"),
        ({"share_r": 0}, ArgumentError, "share_r: got 0"),
        ({"share_r": 7}, ArgumentError, r"share_r: got 7; accepted: 1 to 6, .*layers.0.b"),
        ({"share_r": "2"}, ArgumentTypeError, "share_r: got '2'"),
        ({"lora_alpha": 0}, ArgumentError, "lora_alpha"),
        ({"warm_start": "search"}, ArgumentTypeError, "warm_start"),
        ({"modules_to_save": ["head"]}, ArgumentError, "modules_to_save"),
        ({"adapter_dtype": torch.float16}, ArgumentError, "adapter_dtype"),
    ],
)
def test_options_that_cannot_be(options, error, words):
    model = blocks("ab", "ab")
    with pytest.raises(error, match=words):
        apply_(model, select(model, "layers.0.a", "layers.1.a"), **options)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_shared_pairs_that_cannot_be_leave_the_model_as_it_was():
    model = blocks("ab", "ab")
    for block in model.layers:
        block.a.to(torch.bfloat16)  # these may have bfloat16 pairs, the others not
    with pytest.raises(ArgumentError, match="adapter_dtype.*layers.0.b"):
        apply_(model, select(model, "layers.0.a", "layers.1.a"), adapter_dtype=torch.bfloat16)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_selections_and_models_that_cannot_be():
    model = blocks("ab", "ab")
    selection = select(model, "layers.0.a", "layers.1.b")
    with pytest.raises(ArgumentError, match=r"selection: got layers.1.b"):
        apply_(blocks("ab", "ac"), selection)
    with pytest.raises(ArgumentTypeError, match="selection: got list"):
        apply_(model, ["layers.0.a"])
    with pytest.raises(ArgumentTypeError, match="model: got str"):
        apply_("bert", selection)
    with pytest.raises(ArgumentError, match="no selected module"):
        apply_(model, select(model))
    search = Search(model, r=3)
    with pytest.raises(SwapError, match=r"`close\(\)`"):
        apply_(model, selection)
    search.close()
    with pytest.raises(ArgumentError, match="r: got 4; accepted: 3"):
        apply_(model, selection, r=4, warm_start=search)
    other = Search(blocks("abc", "bc"), r=4)
    other.close()
    with pytest.raises(ArgumentError, match=r"a search without layers\.1\.a"):
        apply_(model, select(model, "layers.1.a"), r=4, warm_start=other)
    assert not lora_layers(model)
