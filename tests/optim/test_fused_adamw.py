"""`FusedAdamW` beside `torch.optim.AdamW`, on models that were never swapped and on others."""

import io

import pytest
import torch
from delta_lora_runs import make_model, output, snapshot, train, trainable
from torch import nn

from deltadiff import DeltaLoRA, FusedAdamW
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops.dispatch import Dispatch

OPTIONS = {"lr": 1e-2, "betas": (0.9, 0.99), "eps": 1e-6, "weight_decay": 0.1}
SHAPES = [(3, 5), (64, 40), (2000,), (1,), (8, 16)]


def make_net(dtype=torch.float64) -> nn.Sequential:
    """A model without any swapped layer."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.LayerNorm(20), nn.Linear(20, 3)).to(dtype)


def loss_of(model: nn.Module, t: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(t)
    like = model[0].weight
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (12, 3))
    return (model(x.to(like)) - y.to(like)).square().mean()


def steps(model, optimizer, at) -> None:
    for t in at:
        optimizer.zero_grad()
        loss_of(model, t).backward()
        optimizer.step()


@pytest.fixture
def use_backend(monkeypatch):
    """A function that lets optimizers run on a backend."""

    def use(backend: str) -> None:
        chosen = Dispatch(backend, "for the test")
        monkeypatch.setattr("deltadiff.optim.device_step.choose_path", lambda *_: chosen)

    return use


def parameters(randn, path, dtype) -> list[nn.Parameter]:
    return [nn.Parameter(randn(*s, dtype=dtype, device=path.device)) for s in SHAPES]


def flat(tensors) -> torch.Tensor:
    return torch.cat([t.detach().flatten() for t in tensors])


# ------------------------------------------------------------------ beside torch's


def test_thirty_steps_are_those_of_torch(path, dtype, randn, assert_close, use_backend):
    """Against float64, with the error of `torch.optim.AdamW` in the same dtype as the measure."""
    use_backend(path.backend)
    ours = parameters(randn, path, dtype)
    eager = [p.detach().clone().requires_grad_() for p in ours]
    truth = [p.detach().double().requires_grad_() for p in ours]
    optimizers = [
        FusedAdamW(ours, **OPTIONS),
        torch.optim.AdamW(eager, **OPTIONS),
        torch.optim.AdamW(truth, **OPTIONS),
    ]
    for t in range(30):
        grads = [randn(*p.shape, dtype=dtype, device=path.device) for p in ours]
        for params, optimizer in zip((ours, eager, truth), optimizers, strict=True):
            for i, (p, grad) in enumerate(zip(params, grads, strict=True)):
                p.grad = None if (t, i) == (4, 1) else grad.to(p.dtype)
            optimizer.step()
    assert_close(flat(ours), flat(eager), flat(truth).double(), 2)
    own, theirs = ([o.state[p] for p in o.param_groups[0]["params"]] for o in optimizers[::2])
    assert [s["step"] for s in own] == [s["step"] for s in theirs]
    for name in ("exp_avg", "exp_avg_sq"):
        found, wanted = (flat(s[name] for s in states) for states in (own, theirs))
        assert found.dtype == torch.float32
        assert (found - wanted).norm() <= wanted.norm() * 2.0**-22  # a few roundings


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_steps_are_bit_by_bit_those_of_delta_lora_without_updates(dtype):
    results = []
    for kind, options in ((FusedAdamW, {}), (DeltaLoRA, {"update_ratio": 0.0})):
        model = make_model(dtype)
        optimizer = kind(model, lr=1e-2, weight_decay=0.1, **options)
        train(model, optimizer, 20)
        state = [t for s in optimizer.state.values() for t in s.values()]
        results.append([*model.parameters(), *state])
    assert all(map(torch.equal, *results))


def test_param_groups_scheduler_and_clipping():
    """Groups with their own values, an LR schedule, accumulated gradients and clipping."""
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        model = make_net()
        first, _, norm, last = model
        groups = [
            {"params": [*first.parameters(), *norm.parameters()], "lr": 1e-2},
            {"params": list(last.parameters()), "lr": 1e-3, "weight_decay": 0.5},
        ]
        optimizer = kind(groups, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for t in range(20):
            optimizer.zero_grad(set_to_none=bool(t % 2))
            for micro in range(3):
                (loss_of(model, 3 * t + micro) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            if t == 10:
                optimizer.param_groups[1]["betas"] = (0.8, 0.95)
            optimizer.step()
            scheduler.step()
        results.append(output(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def test_parameters_without_gradient_keep_their_own_step_count():
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        model = make_net()
        optimizer = kind(model.parameters(), lr=1e-2, weight_decay=0.01)
        for t in range(10):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t % 3:
                model[0].weight.grad = None
            optimizer.step()
        results.append([*model.parameters(), optimizer.state[model[0].weight]["step"].double()])
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)
    assert results[0][-1] == 4


def test_parameters_of_two_dtypes_in_one_group():
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        model = make_net(torch.float32)
        model[3].double()
        optimizer = kind(model.parameters(), lr=1e-2)
        for t in range(5):
            for p in model.parameters():
                p.grad = torch.full_like(p, 1 / (1 + t))
            optimizer.step()
        results.append(list(model.parameters()))
    torch.testing.assert_close(*results, atol=1e-6, rtol=1e-6)


def test_a_closure_is_called_once_and_its_loss_returned():
    model, calls = make_net(), []
    optimizer = FusedAdamW(model)

    def closure():
        calls.append(torch.is_grad_enabled())
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure) > 0 and calls == [True]


# -------------------------------------------------------------------- what is skipped


@pytest.mark.parametrize("how", ["GradScaler", "skip_nonfinite"])
def test_a_skipped_step_changes_nothing(path, how, use_backend):
    """A run with skipped steps equals the run without them, bit for bit."""
    use_backend(path.backend)
    results = []
    for broken in (set(), {0, 3}):
        model = make_net(torch.float32).to(path.device)
        optimizer = FusedAdamW(model, lr=1e-2, skip_nonfinite=how == "skip_nonfinite")
        scaler = torch.amp.GradScaler(path.device.type, 4.0, enabled=how == "GradScaler")
        done, t = 0, 0
        while done < 4:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, done)).backward()
            before = snapshot(model, optimizer)
            if t in broken:
                model[3].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            if scaler.is_enabled():
                scaler.update(4.0)
            same = all(map(torch.equal, before, snapshot(model, optimizer)))
            assert same == (t in broken)
            done += t not in broken
            t += 1
        results.append(list(model.parameters()))
    assert all(map(torch.equal, *results))


def test_grad_scaler_unscales_in_the_step():
    results = []
    for scale in (1.0, 1024.0):
        model = make_net(torch.float32)
        optimizer = FusedAdamW(model, lr=1e-2)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        for t in range(5):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, t)).backward()
            scaler.step(optimizer)
            scaler.update(scale)
        results.append(output(model))
    assert torch.equal(*results)


def test_without_gradients_nothing_happens():
    model = make_net()
    optimizer = FusedAdamW(model)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


# ---------------------------------------------------------------------- values and state


def test_an_lr_tensor_is_read_in_each_step_and_kept():
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = make_net()
        optimizer = FusedAdamW(model, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for t in range(4):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
            schedule.step()
        results.append(output(model))
    assert torch.equal(*results) and optimizer.param_groups[0]["lr"] is lr
    optimizer.load_state_dict(FusedAdamW(make_net(), lr=0.5).state_dict())
    assert optimizer.param_groups[0]["lr"] is lr and lr == 0.5


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_run_resumes_bit_by_bit(dtype):
    model = make_net(dtype)
    optimizer = FusedAdamW(model, **OPTIONS)
    steps(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    steps(model, optimizer, range(5, 12))
    fresh = make_net(dtype)
    second = FusedAdamW(fresh, lr=0.5)
    fresh.load_state_dict(weights)
    second.load_state_dict(state)
    steps(fresh, second, range(5, 12))
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


@pytest.mark.parametrize("first", [FusedAdamW, torch.optim.AdamW])
@pytest.mark.parametrize("second", [FusedAdamW, torch.optim.AdamW])
def test_states_are_exchanged_with_torch(first, second):
    reference = make_net()
    steps(reference, torch.optim.AdamW(reference.parameters(), **OPTIONS), range(12))
    model = make_net()
    before = first(model.parameters(), **OPTIONS)
    steps(model, before, range(5))
    after = second(model.parameters())
    after.load_state_dict(before.state_dict())
    steps(model, after, range(5, 12))
    torch.testing.assert_close(output(model), output(reference), atol=1e-12, rtol=0)


def test_a_state_of_delta_lora_without_updates_is_read():
    """Searches that earlier versions saved hold such states."""
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.0)
    train(model, optimizer, 4)
    fresh = make_model()
    fresh.load_state_dict(model.state_dict())
    second = FusedAdamW(fresh)
    second.load_state_dict(optimizer.state_dict())
    assert train(fresh, second, 6, start=4) == train(model, optimizer, 6, start=4)
    assert all(map(torch.equal, model.parameters(), fresh.parameters()))


def test_foreign_states_are_refused_and_change_nothing():
    model = make_net()
    optimizer = FusedAdamW(model)
    loss_of(model, 0).backward()
    optimizer.step()
    before = snapshot(model, optimizer)
    narrow = nn.Sequential(nn.Linear(4, 20), nn.LayerNorm(20), nn.Linear(20, 3)).double()
    amsgrad = torch.optim.AdamW(make_net().parameters(), amsgrad=True)
    for p in amsgrad.param_groups[0]["params"]:
        p.grad = torch.ones_like(p)
    amsgrad.step()
    states = [FusedAdamW(m).state_dict() for m in (narrow, nn.Linear(12, 20).double())]
    for state in (*states, amsgrad.state_dict(), DeltaLoRA(make_model()).state_dict()):
        with pytest.raises(ArgumentError, match="state_dict"):
            optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


def test_add_param_group():
    """Groups that join are trained from then on, like those of `torch.optim.AdamW`."""
    results = []
    for kind in (FusedAdamW, torch.optim.AdamW):
        model = make_net()
        optimizer = kind(model[0].parameters(), lr=1e-2)
        for t in range(8):
            if t == 3:
                more = model[3] if kind is FusedAdamW else list(model[3].parameters())
                optimizer.add_param_group({"params": more, "lr": 1e-3})
            optimizer.zero_grad()
            loss_of(model, t).backward()
            optimizer.step()
        results.append(output(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def test_a_group_that_cannot_be_trained_is_not_added():
    model = make_net()
    optimizer = FusedAdamW(model[0], lr=1e-2)
    loss_of(model, 0).backward()
    optimizer.step()
    bad = [
        {"params": [nn.Parameter(torch.zeros(0))]},
        {"params": [nn.Parameter(torch.zeros(2, 2), requires_grad=False)[:, :1]]},
        {"params": model[3], "lr": float("nan")},
    ]
    for group in bad:
        with pytest.raises(ArgumentError):
            optimizer.add_param_group(group)
    assert len(optimizer.param_groups) == 1
    before = snapshot(model, optimizer)
    optimizer.step()
    assert not all(map(torch.equal, before, snapshot(model, optimizer)))


BAD = [
    ({"lr": float("nan")}, ArgumentError, "lr: got nan"),
    ({"lr": torch.tensor([1e-2])}, ArgumentTypeError, "lr: got .*0-dim"),
    ({"lr": -1.0}, ArgumentError, "lr: got -1.0"),
    ({"betas": (0.9, 1.0)}, ArgumentError, "betas"),
    ({"betas": 0.9}, ArgumentTypeError, "betas"),
    ({"eps": -1e-8}, ArgumentError, "eps"),
    ({"weight_decay": float("inf")}, ArgumentError, "weight_decay"),
]


@pytest.mark.parametrize(("options", "error", "message"), BAD)
def test_bad_options(options, error, message):
    with pytest.raises(error, match=message):
        FusedAdamW(make_net(), **options)
    model = make_net()
    optimizer = FusedAdamW(model)
    loss_of(model, 0).backward()
    optimizer.param_groups[0].update(options)
    before = snapshot(model, optimizer)
    with pytest.raises(error, match=message):
        optimizer.step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


def test_sparse_gradients_are_refused():
    table = nn.Embedding(4, 3, sparse=True)
    optimizer = FusedAdamW(table)
    table(torch.tensor([1])).sum().backward()
    with pytest.raises(RuntimeError):
        optimizer.step()


@pytest.mark.gpu
def test_replays_of_a_captured_step_are_steps():
    results = []
    for captured in (False, True):
        model = make_net(torch.float32).cuda()
        optimizer = FusedAdamW(model, lr=1e-2)
        params, graph = trainable(model), torch.cuda.CUDAGraph()
        generator = torch.Generator().manual_seed(0)
        for p in params:
            p.grad = torch.zeros_like(p)
        for t in range(8):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + t)
            for p in params:
                p.grad.copy_(torch.randn(p.shape, generator=generator))
            if captured and t:
                optimizer.send_param_groups()
                if t == 1:
                    with torch.cuda.graph(graph):
                        optimizer.step()
                graph.replay()
            else:
                optimizer.step()
        results.append(params)
    assert all(map(torch.equal, *results))
