"""Training with shared pairs: their gradients, AdamW, Delta-LoRA."""

import pytest
import torch
from shared_pairs import blocks, select, train
from small_models import build

from deltadiff import DeltaLoRA
from deltadiff.diffora import apply_, find_candidates, random_selection
from deltadiff.errors import ArgumentError
from deltadiff.layers.lora_layers import lora_layers


def everything(model) -> dict:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def test_the_gradient_of_a_shared_pair_is_the_sum_over_its_layers():
    model = blocks("ab", "ab", "ab", dtype=torch.float64)
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
            told = layer.delta.product()
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
    model = blocks("ab", "ab")
    apply_(model, select(model, "layers.0.a"))
    shared = [p for p in (model.layers[0].b.lora_A, model.layers[0].b.lora_B)]
    with pytest.raises(ArgumentError, match="a pair of its own"):
        DeltaLoRA(shared, model=model, update_ratio=0.5)
    DeltaLoRA(shared, model=model, update_ratio=0.0)
