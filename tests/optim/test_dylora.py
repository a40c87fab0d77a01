"""`DyLoRA`: the truncation by hand in float64, and what a step may and may not move."""

import copy

import pytest
import torch
from dylora_runs import ALPHA, R, base, data, loss_of, swapped, train
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, save_adapter, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import swap_adalora_
from deltadiff.optim.dylora import DyLoRA


def by_hand(model, x, b, frozen=False, scale=None):
    """The model cut to rank b, with slices of its own leaves; returns (y, leaves)."""
    first, _, second = model
    leaves = []

    def layer(m, x):
        pair = [m.lora_A.detach().clone(), m.lora_B.detach().clone()]
        a, b_ = (p.requires_grad_() for p in pair)
        leaves.extend(pair)
        rows, columns = a[:b], b_[:, :b]
        if frozen:  # all of the truncation is in the product, the last row alone is trained
            rows = torch.cat([a[: b - 1].detach(), a[b - 1 : b]])
            columns = torch.cat([b_[:, : b - 1].detach(), b_[:, b - 1 : b]], dim=1)
        s = ALPHA / b if scale is None else scale
        return x @ m.weight.T + m.bias + s * ((x @ rows.T) @ columns.T)

    return layer(second, torch.tanh(layer(first, x))), leaves


@pytest.mark.parametrize("scale", ["alpha/b", "alpha/r"])
@pytest.mark.parametrize("b", [1, 4, R])
def test_forward_and_gradients_are_those_of_the_slices(b, scale):
    model = swapped()
    optimizer = DyLoRA(model, r_min=b, r_max=b, scale=scale)
    assert optimizer.rank == b
    x, y = data(0)
    found = model(x)
    wanted, leaves = by_hand(model, x, b, scale=None if scale == "alpha/b" else ALPHA / R)
    torch.testing.assert_close(found, wanted, atol=1e-13, rtol=0)
    (found - y).square().mean().backward()
    (wanted - y).square().mean().backward()
    own = [p for m in lora_layers(model).values() for p in (m.lora_A, m.lora_B)]
    for p, leaf in zip(own, leaves, strict=True):
        torch.testing.assert_close(p.grad, leaf.grad, atol=1e-14, rtol=1e-10)
    for m in lora_layers(model).values():
        assert not m.lora_A.grad[b:].any() and not m.lora_B.grad[:, b:].any()  # exactly 0
        assert m.lora_A.grad[:b].any()


def test_layer_on_every_path(path, dtype, randn, assert_close):
    """The cut layer and its gradients on each backend; beyond b they are exactly 0."""
    m, n, k, b = 24, 48, 32, 3
    model = nn.Sequential(nn.Linear(k, n)).to(path.device, dtype)
    swap_(model, r=R, lora_alpha=ALPHA, backend=path.backend, adapter_dtype=dtype)
    (layer,) = lora_layers(model).values()
    with torch.no_grad():
        for p in layer.adapter:
            p.copy_(randn(*p.shape))
    DyLoRA(model, r_min=b, r_max=b)
    x = randn(m, k, dtype=dtype, device=path.device).requires_grad_()
    dy = randn(m, n, dtype=dtype, device=path.device)

    def formula(x, w, bias, a, b_):
        return x @ w.T + bias + ALPHA / b * ((x @ a[:b].T) @ b_[:, :b].T)

    leaves = [x, layer.weight, layer.bias, layer.lora_A, layer.lora_B]
    truth = [t.detach().double().requires_grad_() for t in leaves]
    eager = [t.detach().clone().requires_grad_() for t in leaves]
    results = []
    for y, ts in ((layer(x), leaves), (formula(*eager), eager), (formula(*truth), truth)):
        y.backward(dy.to(y.dtype))
        results.append([y, *(ts[i].grad for i in (0, 3, 4))])
    for i, (found, other, exact) in enumerate(zip(*results, strict=True)):
        assert_close(found, other, exact.detach(), 2 if i == 0 else 3)
    assert not layer.lora_A.grad[b:].any() and not layer.lora_B.grad[:, b:].any()


@pytest.mark.parametrize("frozen", [False, True])
def test_every_step_is_the_papers_in_float64(frozen):
    """torch's AdamW on gradients of the slices, its update kept for the trained rows alone."""
    model = swapped()
    hand = copy.deepcopy(model)
    optimizer = DyLoRA(model, lr=0.02, weight_decay=0.1, frozen=frozen, seed=5)
    params = [p for m in lora_layers(hand).values() for p in (m.lora_A, m.lora_B)]
    adamw = torch.optim.AdamW(params, lr=0.02, weight_decay=0.1)
    seen = set()
    for step in range(25):
        b = optimizer.rank
        seen.add(b)
        x, y = data(step)
        out, leaves = by_hand(hand, x, b, frozen)
        (out - y).square().mean().backward()
        before = [p.detach().clone() for p in params]
        for p, leaf in zip(params, leaves, strict=True):
            p.grad = leaf.grad
        adamw.step()
        trained = slice(b - 1, b) if frozen else slice(0, b)
        with torch.no_grad():
            for i, (p, old) in enumerate(zip(params, before, strict=True)):
                new = p.clone()
                p.copy_(old)
                at = (slice(None), trained) if i % 2 else trained
                p[at] = new[at]
        train(model, optimizer, [step])
        own = [p for m in lora_layers(model).values() for p in (m.lora_A, m.lora_B)]
        for p, q in zip(own, params, strict=True):
            torch.testing.assert_close(p, q, atol=1e-12, rtol=1e-9)
            for name in ("exp_avg", "exp_avg_sq"):
                wanted = adamw.state[q][name]
                torch.testing.assert_close(optimizer.state[p][name], wanted, atol=1e-13, rtol=1e-8)
    assert len(seen) == R


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("frozen", [False, True])
def test_rows_that_are_not_trained_stay_bit_by_bit(frozen, dtype):
    """Neither weight decay nor momentum moves them; without the gate's help AdamW would."""
    model = swapped(dtype)
    optimizer = DyLoRA(model, lr=0.02, weight_decay=0.5, frozen=frozen)
    for step in range(12):
        before = {m: [p.detach().clone() for p in m.adapter] for m in lora_layers(model).values()}
        (b,) = train(model, optimizer, [step])
        first = b - 1 if frozen else 0
        for m, (a, b_) in before.items():
            moved_A = (m.lora_A != a).any(dim=1)
            moved_B = (m.lora_B != b_).any(dim=0)
            wanted = torch.tensor([first <= i < b for i in range(R)])
            assert torch.equal(moved_A, wanted) and torch.equal(moved_B, wanted)
    assert optimizer.state[m.lora_A]["exp_avg"].any()


def test_all_layers_share_one_gate_that_is_written_in_place():
    model = swapped(torch.float32)
    optimizer = DyLoRA(model, seed=0)
    gate = model[0].training_gate
    assert model[0].gate is None and gate is model[2].training_gate
    assert gate.shape == (R,) and not gate.requires_grad
    place = gate.data_ptr()
    for step in range(8):
        b = optimizer.rank
        wanted = [R / b if i < b else 0.0 for i in range(R)]
        torch.testing.assert_close(gate, torch.tensor(wanted), atol=0, rtol=1e-6)
        train(model, optimizer, [step])
    assert model[0].training_gate is gate and gate.data_ptr() == place


def test_another_rank_compiles_nothing_again():
    torch._dynamo.reset()
    model = swapped(torch.float32)
    optimizer = DyLoRA(model, seed=0)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch._dynamo.config.patch(error_on_recompile=True):
        for step in range(6):
            optimizer.zero_grad()
            loss = (compiled(data(step, torch.float32)[0])).square().mean()
            eager = model(data(step, torch.float32)[0]).square().mean()
            torch.testing.assert_close(loss, eager)
            loss.backward()
            optimizer.step()


def test_ranks_follow_the_distribution_and_the_seed():
    def draws(n, **options):
        optimizer = DyLoRA(swapped(torch.float32), **options)
        return [optimizer.rank] + [optimizer.draw() for _ in range(n - 1)]

    uniform = torch.bincount(torch.tensor(draws(3000)), minlength=R + 1)
    assert uniform[0] == 0 and (uniform[1:] - 500).abs().max() < 120  # 5.9 standard deviations
    assert set(draws(60, r_min=2, r_max=4)) == {2, 3, 4}
    skewed = torch.bincount(torch.tensor(draws(2000, distribution=[1, 0, 0, 0, 0, 3])))
    assert skewed[2:6].sum() == 0 and abs(int(skewed[6]) - 1500) < 120
    assert draws(30, seed=3) == draws(30, seed=3) != draws(30, seed=4)


@pytest.mark.parametrize("frozen", [False, True])
def test_a_run_resumes_bit_by_bit(tmp_path, frozen):
    model = swapped()
    optimizer = DyLoRA(model, lr=0.02, frozen=frozen, seed=7)
    train(model, optimizer, range(6))
    save_adapter(model, tmp_path)
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    fresh = base()
    load_adapter(fresh, tmp_path)
    second = DyLoRA(fresh, lr=0.5, frozen=frozen, seed=8)
    second.load_state_dict(torch.load(tmp_path / "optimizer.pt", weights_only=True))
    x, _ = data(9)
    assert torch.equal(fresh(x), model(x))
    ranks = train(model, optimizer, range(6, 16))
    assert train(fresh, second, range(6, 16)) == ranks and len(set(ranks)) > 2
    for a, b in zip(model.parameters(), fresh.parameters(), strict=True):
        assert torch.equal(a, b)


def test_states_saved_by_earlier_versions_are_read():
    """Those also hold an entry of `DeltaLoRA`, which DyLoRA was derived from."""
    model = swapped()
    optimizer = DyLoRA(model, lr=0.02, seed=7)
    train(model, optimizer, range(4))
    saved = copy.deepcopy(optimizer.state_dict())
    t = torch.tensor(4)
    saved["state"]["delta_lora"] = {
        "iteration": t, "w_update": "inplace", "update_ratio": [], "folded": {},
    }  # fmt: skip
    saved["param_groups"][0] |= {"update_ratio": 0.0, "start_step": 0}
    fresh = copy.deepcopy(model)
    second = DyLoRA(fresh, lr=0.5, seed=8)
    second.load_state_dict(saved)
    assert train(fresh, second, range(4, 12)) == train(model, optimizer, range(4, 12))
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_a_step_without_gradients_or_skipped_moves_nothing():
    model = swapped(torch.float32)
    optimizer = DyLoRA(model, lr=0.02, skip_nonfinite=True)
    before = [p.detach().clone() for p in model.parameters()]
    optimizer.step()
    loss_of(model, 0).backward()
    model[0].lora_A.grad[0, 0] = float("nan")
    optimizer.step()
    assert all(map(torch.equal, before, model.parameters()))


def test_heads_are_trained_whole():
    model = base()
    swap_(model, r=R, target_modules=["0"], modules_to_save=["2"])
    optimizer = DyLoRA(model, r_min=1, r_max=1)
    head = model[2].weight.detach().clone()
    train(model, optimizer, [0])
    assert (model[2].weight != head).all()


@pytest.mark.gpu
@pytest.mark.parametrize("frozen", [False, True])
def test_a_captured_step_trains_the_rank_that_was_drawn(frozen):
    results = []
    for captured in (False, True):
        model = swapped(torch.float32).cuda()
        optimizer = DyLoRA(model, lr=0.02, frozen=frozen, seed=2)
        params = [p for m in lora_layers(model).values() for p in m.adapter]
        generator, graph = torch.Generator().manual_seed(0), torch.cuda.CUDAGraph()
        for p in params:
            p.grad = torch.zeros_like(p)
        ranks = []
        for step in range(12):
            ranks.append(optimizer.rank)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            if captured and step == 1:
                with torch.cuda.graph(graph):
                    optimizer.step()
            if captured and step:
                graph.replay()
                optimizer.draw()
            else:
                optimizer.step()
        assert len(set(ranks)) > 2
        results.append(params)
    assert all(map(torch.equal, *results))


BAD = {
    "r_min": ({"r_min": 0}, ArgumentError, "r_min"),
    "r_min type": ({"r_min": 1.0}, ArgumentTypeError, "r_min"),
    "r_max below r_min": ({"r_min": 3, "r_max": 2}, ArgumentError, "r_max"),
    "r_max above r": ({"r_max": 7}, ArgumentError, "r_max: got 7; accepted: at most 6"),
    "scale": ({"scale": "alpha"}, ArgumentError, "scale"),
    "seed": ({"seed": -1}, ArgumentError, "seed"),
    "short": ({"distribution": [1, 1]}, ArgumentError, "distribution"),
    "negative": ({"distribution": [1, 1, 1, 1, 1, -1]}, ArgumentError, "distribution"),
    "zeros": ({"distribution": [0] * 6}, ArgumentError, "distribution"),
    "nan": ({"distribution": [1.0] * 5 + [float("nan")]}, ArgumentError, "distribution"),
    "words": ({"distribution": ["a"] * 6}, ArgumentTypeError, "distribution"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_options(case):
    options, error, match = BAD[case]
    model = swapped()
    with pytest.raises(error, match=match):
        DyLoRA(model, **options)
    assert model[0].gate is None and model[0].training_gate is None


def test_bad_models():
    with pytest.raises(ArgumentError, match="no pair of a swapped layer"):
        DyLoRA(base())
    unlike = base()
    swap_(unlike, r=2, target_modules=["0"])
    swap_(unlike, r=4, target_modules=["2"])
    with pytest.raises(ArgumentError, match=r"ranks \[2, 4\]"):
        DyLoRA(unlike)
    model = swapped()
    with pytest.raises(ArgumentError, match="only one of lora_A and lora_B of 0"):
        DyLoRA([model[0].lora_A], model=model)
    other = base()
    swap_adalora_(other, init_r=4)
    with pytest.raises(ArgumentError, match="a gate of another method"):
        DyLoRA(other)
    optimizer = DyLoRA(model)
    for b in (0, R + 1):
        with pytest.raises(ArgumentError, match="b: got"), optimizer.truncated(b):
            pass
    plain = swapped()
    with pytest.raises(ArgumentError, match="a state of 'DeltaLoRA'"):
        optimizer.load_state_dict(DeltaLoRA(plain, update_ratio=0).state_dict())
