"""AdaLoRA: the paper's equations in float64, PEFT's implementation step by step, the allocation."""

import copy
import json
import warnings

import peft
import pytest
import torch
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, CheckpointError, SwapError
from deltadiff.layers.adapter_format import sha256_of_json
from deltadiff.layers.lora_linear import lora_layers
from deltadiff.optim.adalora import AdaLoRA, Schedule, largest, swap_adalora_

SCHEDULE = {"total_step": 12, "target_r": 2, "tinit": 2, "tfinal": 3, "deltaT": 2}


def base(dtype=torch.float64) -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 20), nn.Tanh(), nn.Linear(20, 6)
    return nn.Sequential(*layers).to(dtype)


def swapped(dtype=torch.float64, **options) -> nn.Sequential:
    model = base(dtype)
    swap_adalora_(model, init_r=4, seed=1, **options)
    return model


def data(step: int, dtype=torch.float64):
    generator = torch.Generator().manual_seed(100 + step)
    make = dict(generator=generator, dtype=torch.float64)
    return torch.randn(16, 12, **make).to(dtype), torch.randn(16, 6, **make).to(dtype)


def loss_of(model, step: int) -> torch.Tensor:
    x, y = data(step, next(model.parameters()).dtype)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps):
    for step in steps:
        optimizer.zero_grad()
        (loss_of(model, step) + optimizer.orthogonality()).backward()
        optimizer.step()


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


def test_largest_keeps_exactly_as_many_and_the_first_of_equals():
    scores = torch.tensor([1.0, 3.0, 2.0, 2.0, 2.0, 0.0])
    assert largest(scores, torch.tensor(3)).tolist() == [False, True, True, True, False, False]
    assert largest(scores, torch.tensor([0])).sum() == 0
    assert largest(torch.zeros(5), torch.tensor(2)).tolist() == [True, True, False, False, False]


def peft_model(orth_reg_weight=0.0, dtype=torch.float64):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, lora_alpha=8,
        target_modules=["0", "2", "4"], orth_reg_weight=orth_reg_weight,
    )  # fmt: skip
    return peft.get_peft_model(base(dtype), config).to(dtype)


def copy_from_peft(model, theirs):
    """The same P, Lambda, Q, and PEFT's scaling, alpha / (r + 1e-5)."""
    layers = theirs.base_model.model
    with torch.no_grad():
        for name, m in lora_layers(model).items():
            other = layers.get_submodule(name)
            m.lora_A.copy_(other.lora_A["default"])
            m.lora_B.copy_(other.lora_B["default"])
            m.gate.copy_(other.lora_E["default"].view(-1))
            m.scaling = 8 / (4 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_peft_step_by_step(dtype):
    """PEFT's layers, importance and allocation, called in the paper's order."""
    torch.manual_seed(3)
    theirs = peft_model(dtype=dtype)
    allocator = theirs.base_model.rankallocator
    model = swapped(dtype, lora_alpha=8)
    copy_from_peft(model, theirs)
    optimizer = AdaLoRA(model, lr=0.02, orth_reg_weight=0, **SCHEDULE)
    # peft 0.21.2 also leaves ranknum, the divisor, trainable; a change of it is no part of AdaLoRA.
    trained = [p for n, p in theirs.named_parameters() if ".lora_" in n]
    adamw = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01)
    tolerance = {"atol": 1e-11, "rtol": 1e-8} if dtype == torch.float64 else {"atol": 2e-4}
    tolerance.setdefault("rtol", 0)
    masked = 0
    for t in range(1, 10):
        x, y = data(t, dtype)
        torch.testing.assert_close(model(x), theirs.base_model.model(x), **tolerance)
        adamw.zero_grad()
        (theirs.base_model.model(x) - y).square().mean().backward()
        allocator.update_ipt(theirs.base_model.model)
        adamw.step()
        budget, masks = allocator.budget_schedule(t)
        assert budget == optimizer.budget(t)
        # At its last choice, T - t_f, PEFT forces a mask; see AdaLoraModel.update_and_allocate.
        if masks or t == 9:
            allocator.mask_to_budget(theirs.base_model.model, budget)
        train(model, optimizer, [t])
        for name, m in lora_layers(model).items():
            other = theirs.base_model.model.get_submodule(name).lora_E["default"].view(-1)
            assert torch.equal(m.gate == 0, other == 0)
            torch.testing.assert_close(m.gate, other, **tolerance)
            masked += int((m.gate == 0).sum())
    assert masked > 6


def test_pefts_regulariser_is_the_mean_of_norms():
    theirs = peft_model()
    model = swapped()
    copy_from_peft(model, theirs)
    norms = []
    for m in lora_layers(model).values():
        a, b = m.lora_A.detach(), m.lora_B.detach()
        norms += [(a @ a.T - torch.eye(4)).norm(), (b.T @ b - torch.eye(4)).norm()]
    optimizer = AdaLoRA(model, orth_reg_weight=1, **SCHEDULE)
    squares = torch.stack(norms).square().sum()
    torch.testing.assert_close(optimizer.orthogonality(), squares, atol=0, rtol=1e-7)


def test_budget_schedule():
    schedule = Schedule(total_step=100, target_r=8, tinit=10, tfinal=30)
    assert [schedule.budget(t, 144, 96) for t in (0, 1, 10)] == [144] * 3
    assert [schedule.budget(t, 144, 96) for t in (70, 71, 100, 500)] == [96] * 4
    assert schedule.budget(40, 144, 96) == 96 + 6  # half way, 48 / 8 are left
    budgets = [schedule.budget(t, 144, 96) for t in range(101)]
    assert budgets == sorted(budgets, reverse=True) and len(set(budgets)) > 20
    exact = Schedule(total_step=10, target_r=1)  # 1000 * 0.7^3 = 343, which floats can miss
    assert exact.budget(3, 1000, 0) == 343
    every = Schedule(total_step=100, tinit=10, tfinal=30, deltaT=7)
    assert [t for t in range(30) if every.chooses(t)] == [14, 21, 28]
    assert every.chooses(70) and every.chooses(99) and not every.chooses(69)


def test_the_start_is_the_base_model():
    model = base()
    x, _ = data(0)
    before = model(x)
    report = swap_adalora_(model, init_r=4, target_modules=["0", "2"], seed=0)
    assert torch.equal(model(x), before) and len(report.rows) == 2
    layer = model[0]
    assert layer.gate.requires_grad and layer.gate.shape == (4,) and layer.scaling == 1
    assert 0.01 < layer.lora_A.std() < 0.03 and 0.01 < layer.lora_B.std() < 0.03
    assert report.trainable == 4 * (12 + 20 + 1) + 4 * (20 + 20 + 1)
    again = base()
    swap_adalora_(again, init_r=4, target_modules=["0", "2"], seed=0)
    assert torch.equal(again[0].lora_A, layer.lora_A)
    unswap_(model)
    assert type(model[0]) is nn.Linear and model[0].weight.requires_grad


def test_layer_on_every_path(path, dtype, randn, assert_close):
    """W x + s P Lambda Q x and its gradients, on each backend."""
    m, n, k, r = 24, 48, 32, 5
    layer = nn.Sequential(nn.Linear(k, n))
    with torch.no_grad():
        layer[0].weight.copy_(randn(n, k, scale=0.1))
        layer[0].bias.copy_(randn(n))
    layer.to(path.device, dtype)
    swap_adalora_(layer, init_r=r, lora_alpha=10, backend=path.backend, adapter_dtype=dtype)
    (layer,) = lora_layers(layer).values()
    with torch.no_grad():
        for p in layer.adapter:
            p.copy_(randn(*p.shape))
    x = randn(m, k, dtype=dtype, device=path.device).requires_grad_()
    dy = randn(m, n, dtype=dtype, device=path.device)

    def formula(x, w, bias, p, lam, q):
        return x @ w.T + bias + 2.0 * (((x @ q.T) * lam) @ p.T)

    leaves = [x, layer.weight, layer.bias, layer.lora_B, layer.gate, layer.lora_A]
    truth = [t.detach().double().requires_grad_() for t in leaves]
    eager = [t.detach().clone().requires_grad_() for t in leaves]
    results = []
    for y, ts in ((layer(x), leaves), (formula(*eager), eager), (formula(*truth), truth)):
        y.backward(dy.to(y.dtype))
        results.append([y, *(ts[i].grad for i in (0, 3, 4, 5))])
    for i, (found, other, exact) in enumerate(zip(*results, strict=True)):
        assert_close(found, other, exact.detach(), 2 if i == 0 else 3)


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


def test_importance_does_not_depend_on_the_gradient_scale():
    found = []
    for scale in (1.0, 1024.0):
        model = swapped(torch.float32)
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for step in range(3):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, step)).backward()
            scaler.step(optimizer)
            scaler.update(scale)
        found.append(optimizer.state[model[2].gate]["uncertainty"])
    assert found[0].any()
    torch.testing.assert_close(found[0], found[1], atol=0, rtol=1e-5)


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


def test_merge_and_adapter_hold_the_gate(tmp_path):
    model = swapped(lora_alpha=6)
    train(model, AdaLoRA(model, lr=0.05, **SCHEDULE), range(12))
    x, _ = data(50)
    wanted = model(x).detach()
    save_adapter(model, tmp_path)
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert isinstance(fresh[0].gate, nn.Parameter)
    torch.testing.assert_close(fresh(x), wanted, atol=1e-12, rtol=0)
    merge_(model)
    torch.testing.assert_close(model(x), wanted, atol=1e-12, rtol=0)
    assert not torch.allclose(base()(x), wanted, atol=1e-3)


def test_an_adapter_that_does_not_name_its_gate_is_refused(tmp_path):
    save_adapter(swapped(), tmp_path)
    path = tmp_path / "adapter.json"
    config = json.loads(path.read_text())
    config["layers"]["0"].pop("gate")
    config.pop("checksum")
    path.write_text(json.dumps(config | {"checksum": sha256_of_json(config)}))
    with pytest.raises(CheckpointError, match="0.gate"):
        load_adapter(base(), tmp_path)


def test_adapter_of_another_kind_of_gate_is_refused(tmp_path):
    plain = base()
    swap_(plain, r=4)
    save_adapter(plain, tmp_path)
    with pytest.raises(SwapError, match="gate"):
        load_adapter(swapped(), tmp_path)


def test_gates_and_delta_updates_exclude_each_other():
    model = swapped()
    with pytest.raises(ArgumentError, match="has a gate"):
        DeltaLoRA(model, update_ratio=0.5)
    plain = base()
    swap_(plain, r=4)
    optimizer = DeltaLoRA(plain, update_ratio=0.5, w_update="factored")
    loss_of(plain, 0).backward()
    optimizer.step()
    plain[0].gate = torch.ones(4, dtype=torch.float64)
    with pytest.raises(SwapError, match="gate"):
        plain(data(0)[0])


def test_a_second_swap_keeps_the_gates_trainable():
    model = base()
    swap_adalora_(model, init_r=4, target_modules=["0"])
    swap_(model, r=2, target_modules=["2"])
    assert model[0].gate.requires_grad and model[2].gate is None
    optimizer = AdaLoRA(model, **SCHEDULE)
    assert list(optimizer.ranks()) == ["0"] and optimizer.budget(100) == 2


@pytest.mark.parametrize("matter, kept", [((), ("0", "1")), (("1", "3"), ("1", "3"))])
def test_layers_of_one_shape_run_together_and_keep_their_order(matter, kept):
    """Places in the ranking are the model's, though layers are stacked by shape."""
    torch.manual_seed(0)
    shapes = [(8, 8), (8, 6), (6, 8), (8, 8)]
    model = nn.Sequential(*(nn.Linear(k, n) for k, n in shapes)).double()
    swap_adalora_(model, init_r=4, seed=0)
    optimizer = AdaLoRA(model, lr=0.0, weight_decay=0, total_step=1, target_r=2)
    for name, m in lora_layers(model).items():
        m.gate.data.fill_(2.0)
        for p in m.adapter:  # no gradient, so all are equal but those that matter
            p.grad = torch.zeros_like(p)
            optimizer.state[p]["sensitivity"].fill_(float(name in matter))
    optimizer.step()
    assert optimizer.ranks() == {name: 4 if name in kept else 0 for name in "0123"}
    assert torch.equal(model[1].gate, torch.full_like(model[1].gate, 2.0))


def test_parameters_that_move_keep_their_importance():
    results = []
    for moves in (False, True):
        model = swapped()
        optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
        train(model, optimizer, range(5))
        if moves:
            for p in model.parameters():
                p.data = p.data.clone()
        train(model, optimizer, range(5, 14))
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


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
    wrapped = peft_model()
    with pytest.raises(ArgumentTypeError, match="PEFT"):
        swap_adalora_(wrapped)
    assert not lora_layers(wrapped)
    with pytest.raises(ArgumentTypeError, match="init_r"):
        swap_adalora_(base(), init_r=2.0)
    with pytest.raises(ArgumentTypeError, match="model"):
        swap_adalora_([])
    other = AdaLoRA(swapped(), **(SCHEDULE | {"deltaT": 3}))
    with pytest.raises(ArgumentError, match="state_dict"):
        other.load_state_dict(AdaLoRA(swapped(), **SCHEDULE).state_dict())


def test_sixteen_bit_weights_train():
    model = swapped(torch.bfloat16)
    optimizer = AdaLoRA(model, lr=0.02, **SCHEDULE)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, optimizer, range(14))
    assert model[0].gate.dtype == torch.float32 and sum(optimizer.ranks().values()) == 6
