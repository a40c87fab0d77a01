"""Stage 2 of DiffoRA: who shares a pair, training, Delta-LoRA, checkpoints, bad input."""

import copy
import json

import pytest
import torch
from safetensors.torch import load_file
from small_models import ARCHITECTURES, Block, Stack, build, loss_of
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_, swap_report, unswap_
from deltadiff.diffora import (
    Search,
    Selection,
    apply_,
    find_candidates,
    random_selection,
    selection_of,
)
from deltadiff.errors import ArgumentError, ArgumentTypeError, CheckpointError, SwapError
from deltadiff.layers.adapter_format import sha256_of_json
from deltadiff.layers.lora_linear import lora_layers


def stack(*names, dtype=torch.float32, hidden=None) -> Stack:
    torch.manual_seed(0)
    hidden = hidden or [None] * len(names)
    blocks = [Block(n, hidden=h) for n, h in zip(names, hidden, strict=True)]
    return Stack(*blocks).to(dtype)


def select(model, *names) -> Selection:
    return Selection(find_candidates(model), frozenset(names), 0.5)


def train(model, optimizer, steps=4):
    for t in range(steps):
        optimizer.zero_grad()
        loss_of(model, range(8 * t, 8 * t + 8)).backward()
        optimizer.step()


def everything(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


# ------------------------------------------------------------------- who shares what


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
    model = stack("ab", "ab", "ab", "ab", hidden=[9, 9, 12, 12])
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
    model = stack("ab", "ab", "ab")
    model.layers[2].to(torch.bfloat16)
    report = apply_(model, select(model, *[f"layers.{i}.a" for i in range(3)]))
    layers = lora_layers(model)
    assert layers["layers.0.b"].lora_A is layers["layers.1.b"].lora_A
    assert layers["layers.2.b"].share_group == "b (bfloat16)"
    assert report.notes == ("b: 2 shared pairs, for weights of float32; bfloat16",)


def test_two_stacks_do_not_share():
    model = nn.Module()
    model.encoder, model.decoder = stack("ab", "ab"), stack("ab", "ab")
    report = apply_(model, random_selection(find_candidates(model), 0.5, seed=3))
    assert {row.shares for row in report.rows if row.shares} <= {
        f"{s}.layers.*.{t}" for s in ("encoder", "decoder") for t in "ab"
    }
    pairs = {}
    for name, layer in lora_layers(model).items():
        if layer.share_group:
            pairs.setdefault(layer.lora_A, set()).add(name.split(".")[0])
    assert pairs and all(len(stacks) == 1 for stacks in pairs.values())


# ------------------------------------------------------------------------- training


def test_the_gradient_of_a_shared_pair_is_the_sum_over_its_layers():
    model = stack("ab", "ab", "ab", dtype=torch.float64)
    apply_(model, select(model, "layers.0.a", "layers.1.a", "layers.2.a"), share_r=2, seed=0)
    layers = [model.layers[i].b for i in range(3)]
    a, b = layers[0].lora_A, layers[0].lora_B
    with torch.no_grad():
        b.normal_(generator=torch.Generator().manual_seed(1))
    x = torch.randn(5, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    model(x).square().sum().backward()

    copies = [(a.detach().clone().requires_grad_(), b.detach().clone().requires_grad_())
              for _ in layers]  # fmt: skip
    y = x
    for block, (ai, bi) in zip(model.layers, copies, strict=True):
        plain = y @ block.a.weight.T + block.a.bias  # its own B is 0
        y = y + plain + y @ block.b.weight.T + block.b.bias + 8 * (y @ ai.T @ bi.T)
    y.square().sum().backward()
    for shared, k in ((a, 0), (b, 1)):
        by_hand = sum(pair[k].grad for pair in copies)
        torch.testing.assert_close(shared.grad, by_hand, atol=1e-9, rtol=1e-9)


def test_two_runs_are_the_same_bit_by_bit():
    def run():
        model = build("bert")
        selection = random_selection(find_candidates(model), 0.5, seed=1)
        apply_(model, selection, seed=0, modules_to_save=["classifier"])
        train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5), steps=6)
        return everything(model)

    one, other = run(), run()
    assert one.keys() == other.keys() and all(torch.equal(one[n], other[n]) for n in one)


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_delta_lora_moves_the_weights_of_selected_modules_only(w_update):
    model, before = build("llama").double(), build("llama").double()
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    apply_(model, selection, r=2, share_r=1, seed=0)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update)
    train(model, optimizer)
    for name, layer in lora_layers(model).items():
        w_0 = before.get_submodule(name).weight
        assert layer.lora_B.any()
        if name in selection.selected:
            told = layer.delta.product(layer.lora_A, layer.lora_B, layer.scaling)
            assert told.B.any()
            moved = told.B @ told.A if w_update == "inplace" else 0 * w_0
            torch.testing.assert_close(layer.weight.detach() - w_0, moved, atol=1e-12, rtol=0)
        else:
            assert layer.delta is None and torch.equal(layer.weight, w_0)


def test_a_shared_pair_gets_the_adamw_of_torch():
    def model():
        fresh = build("bert").double()
        selection = random_selection(find_candidates(fresh), 0.5, seed=1)
        apply_(fresh, selection, seed=0)
        return fresh

    ours, theirs = model(), model()
    train(ours, DeltaLoRA(ours, lr=1e-2, update_ratio=0.0, weight_decay=0.02))
    trained = [p for p in theirs.parameters() if p.requires_grad]
    train(theirs, torch.optim.AdamW(trained, lr=1e-2, weight_decay=0.02))
    for (n, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-10, rtol=0, msg=n)


def test_only_shared_pairs_leave_delta_lora_nothing_to_update():
    model = stack("ab", "ab")
    apply_(model, select(model, "layers.0.a"))
    shared = [p for p in (model.layers[0].b.lora_A, model.layers[0].b.lora_B)]
    with pytest.raises(ArgumentError, match="a pair of its own"):
        DeltaLoRA(shared, model=model, update_ratio=0.5)
    DeltaLoRA(shared, model=model, update_ratio=0.0)


# ------------------------------------------------------------------------ warm start


def test_a_warm_start_computes_what_the_search_computed():
    model = stack("ab", "ab", dtype=torch.float64)
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


# ----------------------------------------------------------------------- taking out


def test_merge_and_unswap_with_shared_pairs():
    model = build("gpt2").double()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    apply_(model, selection, seed=0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.0))
    loss = loss_of(model, range(8)).item()
    merged = copy.deepcopy(model)
    merge_(merged)
    assert loss_of(merged, range(8)).item() == pytest.approx(loss, abs=1e-12)
    assert selection_of(merged) is None and not lora_layers(merged)
    unswap_(model)
    assert selection_of(model) is None
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) and p.requires_grad


# ---------------------------------------------------------------------- checkpoints


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "llama"])
def test_an_adapter_restores_pairs_sharing_selection_and_gates(tmp_path, name, w_update):
    model = build(name).double()
    search = Search(model, r=2, seed=0)
    selection = search.gates().discretise(0.5)
    search.close()
    apply_(model, selection, r=3, share_r=2, seed=0)
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update))
    loss = loss_of(model, range(8)).item()
    config = json.loads(save_adapter(model, tmp_path).read_text())
    stored = load_file(tmp_path / config["weights"])
    own = [n for n in stored if n.endswith("lora_A")]
    assert len(own) == len({layer.lora_A for layer in lora_layers(model).values()})
    assert len(own) < len(lora_layers(model))

    fresh = build(name).double()
    report = load_adapter(fresh, tmp_path)
    assert loss_of(fresh, range(8)).item() == pytest.approx(loss, abs=1e-12)
    assert [r.shares for r in report.rows] == [r.shares for r in swap_report(model).rows]
    assert report.trainable == swap_report(model).trainable
    assert selection_of(fresh) == selection and selection_of(fresh).gates == search.gates()
    load_adapter(fresh, tmp_path)  # again, into a model that is swapped so
    assert loss_of(fresh, range(8)).item() == pytest.approx(loss, abs=1e-12)
    layers, theirs = lora_layers(fresh), lora_layers(model)
    for a in layers:
        for b in layers:
            same = theirs[a].lora_A is theirs[b].lora_A
            assert (layers[a].lora_A is layers[b].lora_A) == same


def test_training_goes_on_after_loading_as_without(tmp_path):
    def fresh():
        model = build("bert").double()
        apply_(model, random_selection(find_candidates(model), 0.5, seed=1), seed=0)
        return model

    model = fresh()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    train(model, optimizer, 3)
    save_adapter(model, tmp_path)
    state = copy.deepcopy(optimizer.state_dict())
    train(model, optimizer, 3)
    again = build("bert").double()
    load_adapter(again, tmp_path)
    optimizer = DeltaLoRA(again, lr=1e-2, update_ratio=0.5, w_update="factored")
    optimizer.load_state_dict(state)
    train(again, optimizer, 3)
    for (n, p), q in zip(again.named_parameters(), model.named_parameters(), strict=True):
        assert n == q[0] and torch.equal(p, q[1]), n


def test_adapters_that_share_otherwise_do_not_fit(tmp_path):
    model = stack("ab", "ab")
    apply_(model, select(model, "layers.0.a", "layers.1.a"), r=2, share_r=2)
    path = save_adapter(model, tmp_path)
    other = stack("ab", "ab")
    swap_(other, r=2)
    with pytest.raises(SwapError, match=r"layers.1.b: got the pair of layers.1.b.*layers.0.b"):
        load_adapter(other, tmp_path)
    config = json.loads(path.read_text())
    config["layers"]["layers.1.b"]["pair_of"] = "layers.7.b"
    del config["checksum"]
    path.write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))
    with pytest.raises(CheckpointError, match=r"layers.1.b with the pair of layers.7.b"):
        load_adapter(stack("ab", "ab"), tmp_path)


# ------------------------------------------------------------------------ bad input


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
    model = stack("ab", "ab")
    with pytest.raises(error, match=words):
        apply_(model, select(model, "layers.0.a", "layers.1.a"), **options)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_shared_pairs_that_cannot_be_leave_the_model_as_it_was():
    model = stack("ab", "ab")
    for block in model.layers:
        block.a.to(torch.bfloat16)  # these may have bfloat16 pairs, the others not
    with pytest.raises(ArgumentError, match="adapter_dtype.*layers.0.b"):
        apply_(model, select(model, "layers.0.a", "layers.1.a"), adapter_dtype=torch.bfloat16)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_selections_and_models_that_cannot_be():
    model = stack("ab", "ab")
    selection = select(model, "layers.0.a", "layers.1.b")
    with pytest.raises(ArgumentError, match=r"selection: got layers.1.b"):
        apply_(stack("ab", "ac"), selection)
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
    other = Search(stack("abc", "bc"), r=4)
    other.close()
    with pytest.raises(ArgumentError, match=r"a search without layers\.1\.a"):
        apply_(model, select(model, "layers.1.a"), r=4, warm_start=other)
    assert not lora_layers(model)
