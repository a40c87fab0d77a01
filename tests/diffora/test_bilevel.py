"""Stage 1 of DiffoRA: equations 10, 11 and 13 against float64, one step, what a bad step leaves."""

import math

import pytest
import torch
from small_models import ARCHITECTURES, Block, Stack, build, loss_of
from torch import nn

from deltadiff import DeltaLoRA, merge_, swap_
from deltadiff.diffora import Search, find_candidates
from deltadiff.errors import ArgumentError, ArgumentTypeError, NonFiniteLossError, SwapError
from deltadiff.layers.lora_linear import lora_layers


def stack(*names, dtype=torch.float32, seed=0) -> Stack:
    torch.manual_seed(seed)
    return Stack(*map(Block, names)).to(dtype)


def data(seed, dtype=torch.float32, width=6):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(10, width, generator=generator, dtype=torch.float64)
    return x.to(dtype), torch.randn(10, width, generator=generator, dtype=torch.float64).to(dtype)


def squares(model, batch):
    x, y = batch
    return (model(x) - y).square().mean()


def warmed(model, steps=2, **options) -> Search:
    """A search whose B is not 0 any more, so that gates have gradients."""
    state = Search(model, r=2, seed=0, **{"lr": 1e-2, **options})
    for i in range(steps):
        state.inner_step(lambda i=i: squares(model, data(i, model.layers[0].a.weight.dtype)))
    return state


# ------------------------------------------------------------------ equations 10 and 11


def test_gates_are_a_softmax_over_the_modules_of_one_layer():
    state = Search(stack("ab", "bca"), r=2)
    assert state.logits.shape == (2, 3) and state.logits.dtype == torch.float32
    assert state.gates().values == ((0.5, 0.5, None), pytest.approx((1 / 3,) * 3, abs=1e-7))
    rows = [[0.3, -1.2, 0.0], [2.0, 0.5, -0.7]]  # the layer without a "c" keeps 0 there
    with torch.no_grad():
        state.logits.copy_(torch.tensor(rows))
        state.load_state_dict(state.state_dict())
    (a, b, none), second = state.gates().values
    whole = math.exp(0.3) + math.exp(-1.2)
    assert none is None
    assert (a, b) == pytest.approx((math.exp(0.3) / whole, math.exp(-1.2) / whole), rel=1e-6)
    whole = sum(map(math.exp, rows[1]))
    assert second == pytest.approx([math.exp(v) / whole for v in rows[1]], rel=1e-6)


def test_a_gate_scales_the_branch_of_its_module():
    model = stack("ab", "ba", dtype=torch.float64)
    plain = {name: m.weight for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    bias = {name: m.bias for name, m in model.named_modules() if isinstance(m, nn.Linear)}
    state = warmed(model, lora_alpha=6)  # r = 2, so the scaling is 3
    with torch.no_grad():
        state.logits.copy_(torch.tensor([[0.4, -0.3], [1.0, 0.2]]))
        state.load_state_dict(state.state_dict())
    places, gates = state.candidates.places, state.gates().values
    x, _ = data(7, torch.float64)
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


# ------------------------------------------------------------------ equation 13


def adam(p, grad, m, v, t, lr, betas, decay, decoupled):
    """One step by its formula, in float64; returns p, m, v."""
    p = p * (1 - lr * decay) if decoupled else p
    grad = grad if decoupled else grad + decay * p
    m = betas[0] * m + (1 - betas[0]) * grad
    v = betas[1] * v + (1 - betas[1]) * grad * grad
    return p - lr * (m / (1 - betas[0] ** t)) / ((v / (1 - betas[1] ** t)).sqrt() + 1e-8), m, v


def test_the_alternation_of_algorithm_1_by_hand():
    """V = 3 rounds of one step on the logits, then T = 2 on A and B, in float64 throughout."""
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

    def loss_by_hand(A, B, logits, batch):
        x, target = batch
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
        batch = data(100 + number, torch.float64)
        leaf = logits.requires_grad_(True)
        (grad,) = torch.autograd.grad(loss_by_hand(A, B, leaf, batch), [leaf])
        logits, *gate_moments = adam(
            leaf.detach(), grad, *gate_moments, number + 1, 0.1, (0.5, 0.9), 0.03, False
        )
        state.gate_step(lambda batch=batch: squares(model, batch))
        torch.testing.assert_close(state.logits.detach().double(), logits, atol=1e-5, rtol=0)
        for t in range(2):
            step += 1
            batch = data(2 * number + t, torch.float64)
            leaves = [p.requires_grad_(True) for n in names for p in (A[n], B[n])]
            grads = torch.autograd.grad(loss_by_hand(A, B, logits, batch), leaves)
            for k, n in enumerate(names):
                rest = step, 0.05, (0.8, 0.9), 0.02, True
                ma, va, mb, vb = moments[n]
                a, ma, va = adam(A[n].detach(), grads[2 * k], ma, va, *rest)
                b, mb, vb = adam(B[n].detach(), grads[2 * k + 1], mb, vb, *rest)
                A[n], B[n], moments[n] = a, b, [ma, va, mb, vb]
            state.inner_step(lambda batch=batch: squares(model, batch))
            for n, layer in state.layers.items():  # gates are float32, the rest float64
                torch.testing.assert_close(layer.lora_A.detach(), A[n], atol=1e-5, rtol=0)
                torch.testing.assert_close(layer.lora_B.detach(), B[n], atol=1e-5, rtol=0)
    assert logits.abs().min() > 1e-3  # they moved, and the tolerance could tell


def test_gradients_of_the_logits_on_every_path(path, dtype, assert_close):
    """Through the fused layers, against the same model in float64 and in eager PyTorch."""

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
        state.gate_step(lambda: squares(model, [t.to(device) for t in data(1, dtype)]))
        return found["g"].cpu()

    truth = grad(torch.float64, "reference").double()
    eager = grad(dtype, "reference")
    assert_close(grad(dtype, path.backend, path.device), eager, truth, factor=3, dtype=dtype)


def test_a_gate_step_leaves_the_pairs_alone_and_an_inner_step_the_gates():
    model = stack("ab", "ab")
    state = warmed(model)
    pairs = {n: p.detach().clone() for n, p in state.trained.items()}
    logits, seen = state.logits.detach().clone(), []

    def loss():
        seen.append([p.requires_grad for p in state.trained.values()])
        seen.append([layer.gate.requires_grad for layer in state.layers.values()])
        return squares(model, data(9))

    state.gate_step(loss)
    assert not any(seen[0]) and all(seen[1])  # so no gradient of A and B is computed
    assert all(torch.equal(p, pairs[n]) and p.requires_grad for n, p in state.trained.items())
    assert not torch.equal(state.logits, logits)
    logits = state.logits.detach().clone()
    state.inner_step(loss)
    assert all(seen[2]) and not any(seen[3])
    assert torch.equal(state.logits, logits) and state.logits.grad is None
    assert not any(torch.equal(p, pairs[n]) for n, p in state.trained.items())


def test_gates_of_inner_steps_stay_in_one_place():
    """So that a captured inner step sees those of later rounds."""
    model = stack("ab")
    state = warmed(model)
    layer = state.layers["layers.0.a"]
    place, value = layer.gate.data_ptr(), layer.gate.item()
    state.gate_step(lambda: squares(model, data(9)))
    assert layer.gate.data_ptr() == place and layer.gate.item() != value


# ------------------------------------------------------------------ what it finds


class Halves(nn.Module):
    """Each module sees numbers of its own, so that only one of them can mend what is wrong."""

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
        for ours, theirs in zip(model.layers, teacher.layers, strict=True):  # a loss a layer
            total = total + (ours(want) - theirs(want)).square().mean()
            h, want = ours(h), theirs(want)
        return total

    # Not longer: pairs that fit make up for any gate, whose gradient then tells nothing.
    state = Search(model, r=2, lr=5e-3, gate_lr=5e-2, seed=seed)
    for number in range(20):
        state.gate_step(lambda number=number: loss(100 + number))
        for t in range(3):
            state.inner_step(lambda i=3 * number + t: loss(i))
    assert state.gates().discretise(1 / 3).selected == set(wrong)
    assert min(max(row) for row in state.gates().values) > 1 / 3 + 0.05  # not by a hair
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


# ------------------------------------------------------------------ steps that must not be


def snapshot(state):
    tensors = {n: p.detach().clone() for n, p in state.trained.items()}
    tensors["logits"] = state.logits.detach().clone()
    for kind, optimizer in (("inner", state.optimizer), ("gate", state.gate_optimizer)):
        for p, values in optimizer.state.items():
            if not isinstance(values, dict):
                continue
            for key, t in values.items():
                if isinstance(t, torch.Tensor):
                    tensors[kind, id(p), key] = t.detach().clone()
    tensors["fixed"] = torch.stack([layer.gate for layer in state.layers.values()]).clone()
    return tensors, (state.round, state.index)


def assert_same(one, other):
    assert one[1] == other[1] and one[0].keys() == other[0].keys()
    for key, t in one[0].items():
        assert torch.equal(t, other[0][key]), key


@pytest.mark.parametrize("every", [1, 4])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize(
    ("kind", "words"),
    [("gate", "the validation batch of round 2"), ("inner", "training batch 3 of round 1")],
)
def test_a_loss_that_is_not_finite_stops_the_search(every, bad, kind, words):
    model = stack("ab", "ab")
    state = warmed(model, steps=0)
    state._read_every = every  # 4: as on a GPU, where the host looks later
    good = [("gate", 0), ("inner", 0), ("inner", 1)]
    for name, i in good:
        getattr(state, f"{name}_step")(lambda i=i: squares(model, data(i)))
    before = snapshot(state)
    with pytest.raises(NonFiniteLossError, match=words) as stop:
        getattr(state, f"{kind}_step")(lambda: squares(model, data(5)) * bad)
        for i in range(9):  # none of these is taken
            state.inner_step(lambda i=i: squares(model, data(i)))
    assert str(bad) in str(stop.value)
    assert_same(snapshot(state), before)
    assert len(state.inner_losses) == 2 and len(state.gate_losses) == 1

    again = warmed(stack("ab", "ab"), steps=0)
    for s, m in ((state, model), (again, again.model)):
        for name, i in good if s is again else []:
            getattr(s, f"{name}_step")(lambda i=i, m=m: squares(m, data(i)))
        s.gate_step(lambda m=m: squares(m, data(8)))
        s.inner_step(lambda m=m: squares(m, data(9)))
        s.check()
    assert torch.equal(state.logits, again.logits)  # it went on as if the batch had not been
    for n, p in state.trained.items():
        assert torch.equal(p, again.trained[n])


def test_a_gradient_that_is_not_finite_stops_it_too():
    model = stack("ab")
    state = warmed(model)
    before = snapshot(state)

    def loss():
        return (squares(model, data(1)) * 0).sqrt()  # its derivative is infinite, times 0

    with pytest.raises(NonFiniteLossError, match="a gradient is not finite"):
        state.inner_step(loss)
    assert_same(snapshot(state), before)


# ------------------------------------------------------------------ beside other parts


def test_merging_keeps_what_the_gates_let_through():
    model = stack("ab", "ba", dtype=torch.float64)
    state = warmed(model)
    state.gate_step(lambda: squares(model, data(9, torch.float64)))
    x, _ = data(7, torch.float64)
    y = model(x)
    merge_(model)
    torch.testing.assert_close(model(x), y, atol=1e-12, rtol=0)


def test_delta_lora_does_not_update_weights_behind_a_gate():
    model = stack("ab")
    Search(model, r=2)
    with pytest.raises(ArgumentError, match="layers.0.a, which has a gate"):
        DeltaLoRA(model, update_ratio=0.5)


# ------------------------------------------------------------------ bad input


@pytest.mark.parametrize(
    ("options", "error", "words"),
    [
        ({"r": 0}, ArgumentError, "r: got 0"),
        ({"lr": -1.0}, ArgumentError, "lr"),
        ({"gate_lr": math.nan}, ArgumentError, "gate_lr"),
        ({"gate_betas": (0.5, 1.0)}, ArgumentError, "betas"),
        ({"betas": 0.9}, ArgumentTypeError, "betas"),
        ({"weight_decay": -1.0}, ArgumentError, "weight_decay"),
        ({"gate_weight_decay": "no"}, ArgumentTypeError, "gate_weight_decay"),
        ({"target_modules": ["a"]}, ArgumentError, "one module in layers.0"),
        ({"modules_to_save": ["head"]}, ArgumentError, "modules_to_save"),
    ],
)
def test_a_search_that_cannot_be(options, error, words):
    model = stack("ab", "ab")
    with pytest.raises(error, match=words):
        Search(model, **options)
    assert not lora_layers(model) and all(p.requires_grad for p in model.parameters())


def test_models_that_cannot_be_searched():
    model = stack("ab")
    swap_(model, r=2)
    with pytest.raises(SwapError, match="swapped already"):
        Search(model)
    model = stack("ab", "ab")
    model.layers[1].to("meta")
    with pytest.raises(ArgumentError, match="cpu, meta"):
        Search(model)


def test_losses_that_are_none():
    model = stack("ab")
    state = warmed(model)
    before = snapshot(state)
    for step in (state.gate_step, state.inner_step):
        for value, words in ((1.5, "1.5"), (torch.zeros(3), r"shape \(3,\)"),
                             (torch.zeros(()), "depends on nothing")):  # fmt: skip
            with pytest.raises(ArgumentError, match=words):
                step(lambda value=value: value)
        with pytest.raises(KeyError, match="labels"):
            step(lambda: {}["labels"])
    assert_same(snapshot(state), before)
    assert all(p.requires_grad for p in state.trained.values())


def test_a_closed_search():
    state = warmed(stack("ab"))
    state.close()
    for call in (state.close, lambda: state.gate_step(None), lambda: state.inner_step(None)):
        with pytest.raises(SwapError, match="closed"):
            call()


def test_a_state_of_other_candidates_is_refused():
    state = warmed(stack("abc", "abc"))
    saved = state.state_dict()
    for names, given, wanted in (
        (("abc", "ab"), "layers.1.c", "no more candidates"),
        (("abc", "abd"), "layers.1.c", "layers.1.d"),
        (("abc", "abc", "abc"), "none", "layers.2.a"),
    ):
        other = Search(stack(*names), r=2)
        before = snapshot(other)
        with pytest.raises(ArgumentError, match=f"candidates: got {given}; accepted: {wanted}"):
            other.load_state_dict(saved)
        assert_same(snapshot(other), before)
    other = Search(stack("abc", "abc"), r=3)
    with pytest.raises(ArgumentError, match=r"layers.0.a.lora_A: got shape \(2, 6\)"):
        other.load_state_dict(saved)
    assert find_candidates(stack("abc")).layers == ("layers.0",)


def test_steps_through_a_compiled_model():
    """No graph breaks; compiled for gate steps and for inner steps, then not again."""
    torch._dynamo.reset()
    results = []
    for compiles in (False, True):
        model = stack("ab", "ab")
        forward = torch.compile(model, fullgraph=True) if compiles else model
        state = Search(model, r=2, lr=1e-2, seed=0)
        for k in range(4):
            if k == 2:  # both kinds have been seen
                torch.compiler.set_stance("fail_on_recompile")
            try:
                for step in (state.inner_step, state.gate_step):
                    step(lambda k=k, f=forward: squares(f, data(k)))
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
        batches = [[t.to(device) for t in data(k)] for k in range(6)]
        for k, batch in enumerate(batches):
            if k == 3:
                state.check()  # so that no look at the losses falls due below
                torch.cuda.set_sync_debug_mode("error" if device == "cuda" else "default")
            try:
                state.inner_step(lambda batch=batch, model=model: squares(model, batch))
                state.gate_step(lambda batch=batch, model=model: squares(model, batch))
            except BaseException:
                torch.cuda.set_sync_debug_mode("default")
                raise
        torch.cuda.set_sync_debug_mode("default")
        found.append([v for row in state.gates().values for v in row if v is not None])
    assert found[1] == pytest.approx(found[0], abs=1e-3)
