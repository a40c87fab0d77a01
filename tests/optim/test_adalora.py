"""`AdaLoRA`: every step is the paper's, the allocation, what a step may and may not change."""

import copy
import warnings

import pytest
import torch
from adalora_runs import SCHEDULE, base, loss_of, swapped, train
from delta_lora_runs import snapshot
from older_states import as_older
from torch import nn

from deltadiff import DeltaLoRA, FusedAdamW, load_adapter, save_adapter, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_


class ByHand:
    """Algorithm 1 of the paper with plain tensors, one triplet at a time."""

    def __init__(self, model, lr, gamma, weight_decay=0.0):
        self.model, self.gamma = copy.deepcopy(model), gamma
        layers = [m for m in self.model if hasattr(m, "gate")]
        self.triples = [(m.lora_B, m.gate, m.lora_A) for m in layers]
        self.params = [p for triple in self.triples for p in triple]
        self.adamw = torch.optim.AdamW(self.params, lr=lr, weight_decay=weight_decay)
        self.mean = [torch.zeros_like(p) for p in self.params]
        self.spread = [torch.zeros_like(p) for p in self.params]
        self.t = 0

    def regulariser(self):
        total = 0
        for p, _, q in self.triples:
            r = q.shape[0]
            for i in range(r):
                for j in range(r):
                    one = 1.0 if i == j else 0.0
                    total = total + (p[:, i] @ p[:, j] - one) ** 2 + (q[i] @ q[j] - one) ** 2
        return total

    def budget(self, t):
        if t <= 2:
            return 12
        if t >= 12 - 3:
            return 6
        return int(6 + (12 - 6) * (1 - (t - 2) / (12 - 2 - 3)) ** 3)

    def step(self, step):
        self.t += 1
        self.adamw.zero_grad()
        (loss_of(self.model, step) + self.gamma * self.regulariser()).backward()
        if self.t <= 12 - 3:
            for p, mean, spread in zip(self.params, self.mean, self.spread, strict=True):
                i = (p * p.grad).abs().detach()
                mean.copy_(0.85 * mean + 0.15 * i)
                spread.copy_(0.85 * spread + 0.15 * (i - mean).abs())
        self.adamw.step()
        if not (self.t >= 9 or (self.t > 2 and self.t % 2 == 0)):
            return
        s = [m * u for m, u in zip(self.mean, self.spread, strict=True)]
        scores = []
        for k, (_, gate, _) in enumerate(self.triples):
            sp, sl, sq = s[3 * k : 3 * k + 3]
            for i in range(len(gate)):
                scores.append((float(sl[i] + sp[:, i].mean() + sq[i].mean()), k, i))
        kept = sorted(scores, key=lambda entry: -entry[0])[: self.budget(self.t)]
        kept = {(k, i) for _, k, i in kept}
        with torch.no_grad():
            for k, (_, gate, _) in enumerate(self.triples):
                for i in range(len(gate)):
                    if (k, i) not in kept:
                        gate[i] = 0


def test_every_step_is_the_papers_in_float64():
    model = swapped()
    hand = ByHand(model, lr=0.02, gamma=0.1, weight_decay=0.01)
    optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
    zeros = []
    for step in range(14):
        train(model, optimizer, [step])
        hand.step(step)
        layers = lora_layers(model).values()
        found = [p for m in layers for p in (m.lora_B, m.gate, m.lora_A)]
        for mine, theirs, mean, spread in zip(
            found, hand.params, hand.mean, hand.spread, strict=True
        ):
            torch.testing.assert_close(mine, theirs, atol=1e-12, rtol=1e-9)
            state = optimizer.state[mine]
            torch.testing.assert_close(state["sensitivity"], mean, atol=1e-14, rtol=1e-9)
            torch.testing.assert_close(state["uncertainty"], spread, atol=1e-14, rtol=1e-9)
        zeros.append(sum(int((m.gate == 0).sum()) for m in layers))
    assert zeros[-1] == 6 and optimizer.budget(13) == 6
    assert any(0 < z < 6 for z in zeros)  # some steps were between all and the target


def test_orthogonality_by_hand():
    model = swapped()
    optimizer = AdaLoRA(model, orth_reg_weight=0.5, **SCHEDULE)
    found = optimizer.orthogonality()
    wanted = 0.5 * ByHand(model, 0.1, 0.5).regulariser()
    torch.testing.assert_close(found, wanted, atol=0, rtol=1e-12)
    with torch.no_grad():
        for m in lora_layers(model).values():
            m.lora_A.copy_(torch.eye(*m.lora_A.shape))
            m.lora_B.copy_(torch.eye(*m.lora_B.shape))
    assert optimizer.orthogonality() == 0


def test_budget_goes_to_the_layer_that_matters():
    """Three layers side by side, but the target is a low-rank change of one of them."""

    class Sum(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = (nn.Linear(16, 16, bias=False) for _ in range(3))

        def forward(self, x):
            return self.a(x[0]) + self.b(x[1]) + self.c(x[2])

    torch.manual_seed(0)
    model = Sum()
    truth = copy.deepcopy(model)
    with torch.no_grad():
        truth.b.weight += torch.randn(16, 4) @ torch.randn(4, 16) / 4
    swap_adalora_(model, init_r=6, seed=0)
    optimizer = AdaLoRA(
        model, lr=0.02, weight_decay=0, total_step=150, target_r=2, tinit=20, tfinal=50, deltaT=5
    )
    generator = torch.Generator().manual_seed(0)
    for _ in range(150):
        x = torch.randn(3, 64, 16, generator=generator)
        optimizer.zero_grad()
        loss = (model(x) - truth(x)).square().mean()
        (loss + optimizer.orthogonality()).backward()
        optimizer.step()
    ranks = optimizer.ranks()
    assert sum(ranks.values()) == 6 and ranks["b"] >= 4
    assert ranks["b"] > ranks["a"] + ranks["c"]


def test_a_run_resumes_bit_by_bit(tmp_path):
    model = swapped()
    optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
    train(model, optimizer, range(6))
    save_adapter(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = swapped()
    second = AdaLoRA(fresh, lr=0.5, **SCHEDULE)
    load_adapter(fresh, tmp_path)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    train(model, optimizer, range(6, 14))
    train(fresh, second, range(6, 14))
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)
    assert optimizer.ranks() == second.ranks() and sum(second.ranks().values()) == 6


@pytest.mark.parametrize("skip_by", ["skip_nonfinite", "GradScaler"])
def test_a_skipped_step_changes_nothing(skip_by):
    model = swapped(torch.float32)
    optimizer = AdaLoRA(model, lr=0.02, skip_nonfinite=skip_by == "skip_nonfinite", **SCHEDULE)
    scaler = torch.amp.GradScaler("cpu", init_scale=256.0, enabled=skip_by == "GradScaler")

    def run(step, spoil):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, step) + optimizer.orthogonality()).backward()
        if spoil:
            model[2].lora_B.grad[3, 1] = float("inf")
        scaler.step(optimizer)
        scaler.update()

    def everything():
        kept = [p.detach().clone() for m in lora_layers(model).values() for p in m.adapter]
        for name in ("sensitivity", "uncertainty", "exp_avg"):
            for m in lora_layers(model).values():
                kept += [optimizer.state[p][name].clone() for p in m.adapter]
        return kept

    for step in range(5):
        run(step, spoil=False)
    before = everything()
    run(5, spoil=True)
    assert all(map(torch.equal, before, everything()))
    for step in range(5, 14):
        run(step, spoil=False)
    plain = swapped(torch.float32)
    again = AdaLoRA(plain, lr=0.02, **SCHEDULE)
    train(plain, again, range(14))
    assert again.ranks() == optimizer.ranks()
    for a, b in zip(plain.parameters(), model.parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=1e-3)


def test_masked_triplets_come_back():
    """Between two choices all triplets are trained, and a masked one keeps its importance."""
    model = swapped()
    optimizer = AdaLoRA(model, lr=0.05, total_step=40, target_r=1, tinit=0, tfinal=5, deltaT=4)
    masked, back = set(), set()
    for step in range(35):
        train(model, optimizer, [step])
        if (step + 1) % 4 == 0:
            gates = torch.cat([m.gate.detach() for m in lora_layers(model).values()])
            zero = set((gates == 0).nonzero().flatten().tolist())
            assert len(zero) == 12 - optimizer.budget(step + 1)
            back |= masked - zero
            masked = zero
    assert back


def test_groups_of_modules_share_one_budget():
    model = swapped()
    optimizer = AdaLoRA([{"params": model[i]} for i in (0, 2, 4)], lr=0.02, **SCHEDULE)
    whole = swapped()
    train(model, optimizer, range(12))
    train(whole, AdaLoRA(whole, lr=0.02, **SCHEDULE), range(12))
    assert len(optimizer.ranks()) == 3 and sum(optimizer.ranks().values()) == 6
    assert all(map(torch.equal, model.parameters(), whole.parameters()))


@pytest.mark.gpu
def test_a_captured_step_chooses_as_an_eager_one():
    results = []
    for captured in (False, True):
        model = swapped(torch.float32).cuda()
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        params = [p for m in lora_layers(model).values() for p in m.adapter]
        generator, graph = torch.Generator().manual_seed(0), torch.cuda.CUDAGraph()
        for p in params:
            p.grad = torch.zeros_like(p)
        for step in range(14):
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            if captured and step == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
            graph.replay() if captured and step else optimizer.step()
        assert sum(optimizer.ranks().values()) == 6
        results.append(params)
    assert all(map(torch.equal, *results))


BAD = {
    "total_step": ({"total_step": 0}, ArgumentError, "total_step"),
    "total_step type": ({"total_step": 10.0}, ArgumentTypeError, "total_step"),
    "no steps between": ({"total_step": 5}, ArgumentError, "total_step"),
    "target_r": ({"target_r": 5}, ArgumentError, "target_r: got 5; accepted: at most 4"),
    "tinit": ({"tinit": -1}, ArgumentError, "tinit"),
    "tfinal": ({"tfinal": True}, ArgumentTypeError, "tfinal"),
    "deltaT": ({"deltaT": 0}, ArgumentError, "deltaT"),
    "beta1": ({"beta1": 1.0}, ArgumentError, "beta1"),
    "beta2": ({"beta2": -0.1}, ArgumentError, "beta2"),
    "gamma": ({"orth_reg_weight": -1}, ArgumentError, "orth_reg_weight"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, error, match = BAD[case]
    with pytest.raises(error, match=match):
        AdaLoRA(swapped(), **(SCHEDULE | options))


def test_bad_models():
    plain = base()
    swap_(plain, r=4)
    with pytest.raises(ArgumentError, match="no layer with a Lambda"):
        AdaLoRA(plain, **SCHEDULE)
    model = swapped()
    with pytest.raises(ArgumentError, match="not all of lora_A, lora_B and gate of 0"):
        AdaLoRA([model[0].lora_A], model=model, **SCHEDULE)
    with pytest.raises(ArgumentTypeError, match="init_r"):
        swap_adalora_(base(), init_r=2.0)
    with pytest.raises(ArgumentTypeError, match="model"):
        swap_adalora_([])


def test_states_of_another_schedule_or_kind_are_refused_and_change_nothing():
    model = swapped()
    other = AdaLoRA(model, **(SCHEDULE | {"deltaT": 3}))
    before = snapshot(model, other)
    for state in (
        AdaLoRA(swapped(), **SCHEDULE).state_dict(),
        FusedAdamW(swapped()).state_dict(),
        DeltaLoRA(swapped(), update_ratio=0.0).state_dict(),
    ):
        with pytest.raises(ArgumentError, match="state_dict"):
            other.load_state_dict(state)
    assert all(map(torch.equal, before, snapshot(model, other)))


def test_states_saved_by_earlier_versions_are_read():
    """Those hold t in an entry of `DeltaLoRA`, which AdaLoRA was derived from."""
    results = []
    for old in (False, True):
        model = swapped()
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        train(model, optimizer, range(6))
        saved = copy.deepcopy(optimizer.state_dict())
        if old:
            saved = as_older(saved, optimizer)
            t = saved["state"]["adalora"].pop("iteration")
            saved["state"]["delta_lora"] = {
                "iteration": t, "w_update": "inplace", "update_ratio": [], "folded": {},
            }  # fmt: skip
            saved["param_groups"][0] |= {"update_ratio": 0.0, "start_step": 0}
        second = AdaLoRA(model, lr=0.5, **SCHEDULE)
        second.load_state_dict(saved)
        train(model, second, range(6, 14))
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


def test_sixteen_bit_weights_train():
    model = swapped(torch.bfloat16)
    optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(14))
    assert model[0].gate.dtype == torch.float32 and sum(optimizer.ranks().values()) == 6
