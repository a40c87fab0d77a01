"""A model that DyLoRA trained works at every rank, and can be cut to one for good."""

import copy

import peft
import pytest
import torch
from dylora_runs import base, data, loss_of, swapped, train
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import swap_adalora_
from deltadiff.optim.dylora import DyLoRA, truncate_


class Toy:
    """A layer, and the same layer plus a change of singular values 4, 2 and 1 to be learnt."""

    def __init__(self):
        torch.manual_seed(0)
        self.model = nn.Sequential(nn.Linear(16, 16, bias=False))
        self.target = copy.deepcopy(self.model)
        u, v = (torch.linalg.qr(torch.randn(16, 16))[0] for _ in range(2))
        with torch.no_grad():
            self.target[0].weight += u[:, :3] @ torch.diag(torch.tensor([4.0, 2.0, 1.0])) @ v[:3]
        swap_(self.model, r=4, lora_alpha=4, seed=0)

    def train(self, optimizer):
        generator = torch.Generator().manual_seed(0)
        for step in range(800):
            x = torch.randn(64, 16, generator=generator)
            optimizer.param_groups[0]["lr"] = 0.02 * (1 - step / 800)
            optimizer.zero_grad()
            (self.model(x) - self.target(x)).square().mean().backward()
            optimizer.step()

    @torch.no_grad()
    def error(self, model) -> float:
        """|change of W - what was to be learnt|^2, so 5, 1 and 0 at best for ranks 1, 2 and 3."""
        eye = torch.eye(16)
        return (model(eye) - self.target(eye)).square().sum().item()


def test_every_rank_works_after_training():
    toy = Toy()
    optimizer = DyLoRA(toy.model, lr=0.02, weight_decay=0, scale="alpha/r", seed=0)
    toy.train(optimizer)
    for b, best in enumerate([5.0, 1.0, 0.0, 0.0], start=1):
        with optimizer.truncated(b):
            found = toy.error(toy.model)
        assert best - 1e-4 < found < best + 0.5
        cut = copy.deepcopy(toy.model)
        truncate_(cut, b, scale="alpha/r")
        assert toy.error(cut) == pytest.approx(found, rel=1e-4)


@pytest.mark.parametrize("frozen", [False, True])
def test_lower_ranks_are_better_than_those_of_a_cut_lora(frozen):
    lora, toy = Toy(), Toy()
    lora.train(DeltaLoRA(lora.model, lr=0.02, weight_decay=0, update_ratio=0))
    toy.train(DyLoRA(toy.model, lr=0.02, weight_decay=0, frozen=frozen, seed=0))
    assert lora.error(lora.model) < 0.1
    for b in (1, 2, 3):
        ours, theirs = copy.deepcopy(toy.model), copy.deepcopy(lora.model)
        truncate_(ours, b)
        truncate_(theirs, b, scale="alpha/r")
        assert toy.error(ours) < lora.error(theirs)


@pytest.mark.parametrize("scale", ["alpha/b", "alpha/r"])
def test_export_at_a_rank(tmp_path, scale):
    model = swapped()
    optimizer = DyLoRA(model, lr=0.02, scale=scale)
    train(model, optimizer, range(10))
    x, _ = data(50)
    with optimizer.truncated(2):
        wanted = model(x).detach()
    report = truncate_(model, 2, scale=scale)
    assert [row.r for row in report.rows] == [2, 2] and model[0].gate is None
    torch.testing.assert_close(model(x), wanted, atol=1e-13, rtol=0)
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert fresh[0].lora_A.shape == (2, 12) and fresh[0].gate is None
    torch.testing.assert_close(fresh(x), wanted, atol=1e-13, rtol=0)
    DeltaLoRA(fresh, update_ratio=0.5)  # an ordinary LoRA model
    merge_(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)


def test_merge_takes_the_rank_of_the_gate():
    model = swapped()
    optimizer = DyLoRA(model)
    x, _ = data(0)
    with optimizer.truncated(3):
        wanted = model(x).detach()
        merge_(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)


def test_truncate_refuses_what_it_cannot_cut():
    with pytest.raises(SwapError, match="without swapped layers"):
        truncate_(base(), 1)
    with pytest.raises(ArgumentError, match="b: got 7; accepted: 1 to 6"):
        truncate_(swapped(), 7)
    with pytest.raises(ArgumentTypeError, match="b: got True"):
        truncate_(swapped(), True)
    with pytest.raises(ArgumentError, match="scale"):
        truncate_(swapped(), 1, scale="r")
    ada = base()
    swap_adalora_(ada, init_r=4)
    config = peft.LoraConfig(r=4, target_modules=["0"])
    wrapped = peft.get_peft_model(base(), config)
    swap_(wrapped)
    delta = swapped()
    optimizer = DeltaLoRA(delta, update_ratio=0.5)
    loss_of(delta, 0).backward()
    optimizer.step()
    with pytest.raises(SwapError, match="a layer of PEFT"):
        truncate_(wrapped, 2)
    for model in (ada, delta):
        with pytest.raises(SwapError, match="accepted: layers that `swap_` made"):
            truncate_(model, 2)
        assert all(m.r > 2 for m in lora_layers(model).values())
