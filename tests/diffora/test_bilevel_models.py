"""Searches on whole models: what they find, and the model during a search and after it."""

import pytest
import torch
from small_models import ARCHITECTURES, Stack, build, loss_of
from small_searches import batch, squares, stack, started
from torch import nn

from deltadiff import DeltaLoRA, merge_
from deltadiff.diffora import Search
from deltadiff.errors import ArgumentError
from deltadiff.layers.lora_layers import lora_layers


class Halves(nn.Module):
    """Each module sees its own part of x, so that only one module can correct an error."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = (nn.Linear(4, 4, bias=False) for _ in range(3))

    def forward(self, x):
        parts = zip((self.a, self.b, self.c), x.split(4, dim=-1), strict=True)
        return torch.cat([m(part) for m, part in parts], dim=-1)


@pytest.mark.parametrize("seed", range(3))
def test_the_search_finds_the_modules_that_matter(seed):
    torch.manual_seed(seed)
    teacher = Stack(Halves(), Halves(), Halves())
    model = Stack(Halves(), Halves(), Halves())
    model.load_state_dict(teacher.state_dict())
    wrong = ["layers.0.b", "layers.1.a", "layers.2.c"]
    with torch.no_grad():
        for name in wrong:
            module = model.get_submodule(name)
            module.weight += torch.outer(torch.randn(4), torch.randn(4))

    def loss(i):
        x = torch.randn(64, 12, generator=torch.Generator().manual_seed(1000 * seed + i))
        h, want, total = x, x, 0.0
        for ours, theirs in zip(model.layers, teacher.layers, strict=True):  # one loss per layer
            total = total + (ours(want) - theirs(want)).square().mean()
            h, want = ours(h), theirs(want)
        return total

    # A longer search tells less: once the pairs fit, they compensate for any gate.
    state = Search(model, r=2, lr=5e-3, gate_lr=5e-2, seed=seed)
    for number in range(20):
        state.gate_step(lambda number=number: loss(100 + number))
        for t in range(3):
            state.inner_step(lambda i=3 * number + t: loss(i))
    assert state.gates().discretise(1 / 3).selected == set(wrong)
    assert min(max(row) for row in state.gates().values) > 1 / 3 + 0.05  # clearly, not by chance
    assert state.inner_losses[-1] < state.inner_losses[0] / 4


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_search_on_real_architectures_and_the_model_after_it(name):
    model, eager = build(name), build(name)
    for p in list(model.parameters())[::2]:
        p.requires_grad_(False)
    required = {n: p.requires_grad for n, p in model.named_parameters()}
    kinds = {n: type(m) for n, m in model.named_modules()}
    state = Search(model, r=2, lr=1e-2, gate_lr=1e-1, seed=0)
    assert set(lora_layers(model)) == set(state.candidates.places)
    for _ in range(4):
        for _ in range(3):
            state.inner_step(lambda: loss_of(model, range(16)))
        state.gate_step(lambda: loss_of(model, range(16, 32)))
    assert state.inner_losses[-1] < state.inner_losses[0]
    assert (state.round, state.index) == (4, 0) and len(state.gate_losses) == 4
    for row in state.gates().values:
        assert sum(row) == pytest.approx(1, abs=1e-6) and len(set(row)) > 1
    gates = state.gates()
    state.close()
    assert state.gates() == gates
    assert {n: p.requires_grad for n, p in model.named_parameters()} == required
    assert {n: type(m) for n, m in model.named_modules()} == kinds
    for (n, p), q in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert torch.equal(p, q), n


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_new_head_is_trained_with_the_pairs_and_given_back(dtype):
    model = build("bert").to(dtype)
    before = model.classifier.weight.detach().clone()
    state = Search(model, r=2, modules_to_save=["classifier"], lr=1e-2)
    state.gate_step(lambda: loss_of(model, range(8)))
    assert torch.equal(model.classifier.weight, before)
    state.inner_step(lambda: loss_of(model, range(8)))
    trained = model.classifier.weight.detach().clone()
    assert not torch.equal(trained, before)
    state.close()
    assert torch.equal(model.classifier.weight, before)
    assert torch.equal(state.heads["classifier.weight"], trained)


@pytest.mark.gpu
def test_a_model_that_moves_takes_its_gates_along():
    found = []
    for moves in ((), (0,), (0, 2)):  # before which steps
        model = stack("ab", "ab")
        state, device = Search(model, r=2, lr=1e-2, seed=0), "cpu"
        for k in range(4):
            if k in moves:
                device = "cuda" if device == "cpu" else "cpu"
                model.to(device)
            pair = [t.to(device) for t in batch(k)]
            state.inner_step(lambda pair=pair, model=model: squares(model, pair))
            state.gate_step(lambda pair=pair, model=model: squares(model, pair))
        assert state.logits.device.type == state.log.failed.device.type == device
        found.append([v for row in state.gates().values for v in row])
    for gates in found[1:]:
        assert gates == pytest.approx(found[0], abs=1e-3)


def test_merging_keeps_what_the_gates_let_through():
    model = stack("ab", "ba", dtype=torch.float64)
    state = started(model)
    state.gate_step(lambda: squares(model, batch(9, torch.float64)))
    x, _ = batch(7, torch.float64)
    y = model(x)
    merge_(model)
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=0)


def test_delta_lora_does_not_update_weights_behind_a_gate():
    model = stack("ab")
    Search(model, r=2)
    with pytest.raises(ArgumentError, match="layers.0.a with a gate"):
        DeltaLoRA(model, update_ratio=0.5)
