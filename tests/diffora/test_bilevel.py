"""Stage 1 of DiffoRA, a step at a time: equations 10 and 13 against float64."""

import pytest
import torch
from small_searches import batch, squares, stack, started
from torch import nn

from deltadiff.diffora import Search


def test_a_gate_scales_the_branch_of_its_module():
    model = stack("ab", "ba", dtype=torch.float64)
    plain = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    bias = {name: m.bias for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = started(model, lora_alpha=6)  # r = 2, so the scaling is 3
    with torch.no_grad():
        state.logits.copy_(torch.tensor([[0.4, -0.3], [1.0, 0.2]]))
        state.load_state_dict(state.state_dict())
    places, gates = state.candidates.places, state.gates().values
    x, _ = batch(7, torch.float64)
    y = x
    for i in range(2):
        total = y
        for t in "ab":
            name = f"layers.{i}.{t}"
            layer, (row, column) = state.layers[name], places[name]
            branch = y @ layer.lora_A.T @ layer.lora_B.T
            total = total + y @ plain[name].T + bias[name] + 3 * gates[row][column] * branch
        y = total
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=0)


def adam(p, grad, m, v, t, lr, betas, decay, decoupled):
    """One step of Adam or AdamW by its formula, in float64; returns p, m, v."""
    p = p * (1 - lr * decay) if decoupled else p
    grad = grad if decoupled else grad + decay * p
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad * grad
    return p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8), m, v


def test_the_alternation_of_algorithm_1_by_hand():
    """V = 3 rounds of one step on the logits and T = 2 steps on A and B, all in float64."""
    model = stack("ab", "ab", dtype=torch.float64)
    frozen = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    w = {n: (m.weight.detach().clone(), m.bias.detach().clone()) for n, m in frozen.items()}
    options = {"lr": 0.05, "betas": (0.8, 0.9), "weight_decay": 0.02}
    outer = {"gate_lr": 0.1, "gate_betas": (0.5, 0.9), "gate_weight_decay": 0.03}
    state = Search(model, r=2, lora_alpha=4, seed=3, **options, **outer)

    names = list(state.layers)
    A = {n: layer.lora_A.detach().clone() for n, layer in state.layers.items()}
    B = {n: layer.lora_B.detach().clone() for n, layer in state.layers.items()}
    logits = torch.zeros(2, 2, dtype=torch.float64)
    moments = {n: [torch.zeros_like(A[n])] * 2 + [torch.zeros_like(B[n])] * 2 for n in names}
    gate_moments = [torch.zeros_like(logits)] * 2

    def loss_by_hand(A, B, logits, pair):
        x, target = pair
        for i, row in enumerate(logits):
            gates = row.exp() / row.exp().sum()
            y = x
            for j, t in enumerate("ab"):
                n = f"layers.{i}.{t}"
                y = y + x @ w[n][0].T + w[n][1] + 2 * gates[j] * (x @ A[n].T @ B[n].T)
            x = y
        return (x - target).square().mean()

    step = 0
    for number in range(3):
        pair = batch(100 + number, torch.float64)
        leaf = logits.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_by_hand(A, B, leaf, pair), [leaf])
        logits, *gate_moments = adam(
            leaf.detach(), grad, *gate_moments, number + 1, 0.1, (0.5, 0.9), 0.03, False
        )
        state.gate_step(lambda pair=pair: squares(model, pair))
        torch.testing.assert_close(state.logits.detach().double(), logits, atol=1e-5, rtol=0)
        for t in range(2):
            step += 1
            pair = batch(2 * number + t, torch.float64)
            leaves = [p.requires_grad_(True) for n in names for p in (A[n], B[n])]
            grads = torch.autograd.grad(loss_by_hand(A, B, logits, pair), leaves)
            for k, n in enumerate(names):
                rest = step, 0.05, (0.8, 0.9), 0.02, True
                ma, va, mb, vb = moments[n]
                a, ma, va = adam(A[n].detach(), grads[2 * k], ma, va, *rest)
                b, mb, vb = adam(B[n].detach(), grads[2 * k + 1], mb, vb, *rest)
                A[n], B[n], moments[n] = a, b, [ma, va, mb, vb]
            state.inner_step(lambda pair=pair: squares(model, pair))
            for n, layer in state.layers.items():  # the gates are float32, everything else float64
                torch.testing.assert_close(layer.lora_A.detach(), A[n], atol=1e-5, rtol=0)
                torch.testing.assert_close(layer.lora_B.detach(), B[n], atol=1e-5, rtol=0)
    assert logits.abs().min() > 1e-3  # they moved much further than the tolerance


def test_gradients_of_the_logits_on_every_path(path, dtype, assert_close):
    """The fused layers are compared with the same model in float64 and in eager PyTorch."""

    def grad(dtype, backend, device="cpu"):
        model = stack("abc", "abc", dtype=torch.float64).to(device, dtype)
        state = Search(model, r=2, backend=backend, seed=0)
        generator = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for p in state.trained.values():
                p.copy_(0.2 * torch.randn(p.shape, generator=generator, dtype=torch.float64))
        found = {}
        step = state.gate_optimizer.step
        state.gate_optimizer.step = lambda: (found.update(g=state.logits.grad.clone()), step())
        state.gate_step(lambda: squares(model, [t.to(device) for t in batch(1, dtype)]))
        return found["g"].cpu()

    truth = grad(torch.float64, "reference").double()
    eager = grad(dtype, "reference")
    assert_close(grad(dtype, path.backend, path.device), eager, truth, factor=3, dtype=dtype)


def test_a_gate_step_leaves_the_pairs_alone_and_an_inner_step_the_gates():
    model = stack("ab", "ab")
    state = started(model)
    pairs = {n: p.detach().clone() for n, p in state.trained.items()}
    logits, seen = state.logits.detach().clone(), []

    def loss():
        seen.append([p.requires_grad for p in state.trained.values()])
        seen.append([layer.gate.requires_grad for layer in state.layers.values()])
        return squares(model, batch(9))

    state.gate_step(loss)
    assert not any(seen[0]) and all(seen[1])  # so no gradient of A and B is computed
    assert all(torch.equal(p, pairs[n]) and p.requires_grad for n, p in state.trained.items())
    assert not torch.equal(state.logits, logits)
    logits = state.logits.detach().clone()
    state.inner_step(loss)
    assert all(seen[2]) and not any(seen[3])
    assert torch.equal(state.logits, logits) and state.logits.grad is None
    assert not any(torch.equal(p, pairs[n]) for n, p in state.trained.items())


def test_steps_through_a_compiled_model():
    """There is one graph for gate steps and one for inner steps, without breaks."""
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        model = stack("ab", "ab")
        forward = torch.compile(model, fullgraph=True) if compiles else model
        state = Search(model, r=2, lr=1e-2, seed=0)
        for k in range(4):
            if k == 2:  # both kinds of steps are compiled by now
                torch.compiler.set_stance("fail_on_recompile")
            try:
                for step in (state.inner_step, state.gate_step):
                    step(lambda k=k, f=forward: squares(f, batch(k)))
            finally:
                torch.compiler.set_stance("default")
        results.append((state.logits.detach(), *[p.detach() for p in state.trained.values()]))
    torch._dynamo.reset()
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(eager, other, rtol=1e-4, atol=1e-5)


@pytest.mark.gpu
def test_gpu_steps_never_wait_for_the_device():
    found = []
    for device in ("cpu", "cuda"):
        model = stack("abc", "ab").to(device)
        state = Search(model, r=2, lr=1e-2, seed=0)
        batches = [[t.to(device) for t in batch(k)] for k in range(6)]
        for k, pair in enumerate(batches):
            if k == 3:
                state.check()  # so that no losses are due to be read below
                torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                state.inner_step(lambda pair=pair, model=model: squares(model, pair))
                state.gate_step(lambda pair=pair, model=model: squares(model, pair))
            except BaseException:
                torch.cuda.set_sync_debug_mode("default")
                raise
        torch.cuda.set_sync_debug_mode("default")
        found.append([v for row in state.gates().values for v in row if v is not None])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
