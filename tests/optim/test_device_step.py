"""What a `DeltaLoRA` step sends to the device: pointers, options, launches, and CUDA graphs."""

import pytest
import torch
from delta_lora_runs import W_UPDATES, trainable
from torch import nn

from deltadiff import DeltaLoRA, swap_
from deltadiff.errors import ArgumentError, ArgumentTypeError
from deltadiff.ops.dispatch import Dispatch
from deltadiff.optim import device_step


def make_model(device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Linear(16, 3))
    swap_(model.to(device), r=4, target_modules=["0", "2"], modules_to_save=["3"], seed=1)
    return model


def make_grads(params, t) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    return [torch.randn(p.shape, generator=generator).to(p.device) for p in params]


def step(model, optimizer, t, missing=()) -> None:
    params = trainable(model)
    for i, (p, grad) in enumerate(zip(params, make_grads(params, t), strict=True)):
        p.grad = None if i in missing else grad
    optimizer.step()


def everything(model, optimizer) -> list[torch.Tensor]:
    state = [t for s in optimizer.state.values() for t in s.values()]
    scales = [m.delta.rank_scale for m in (model[0], model[2])]
    return [t.detach().clone() for t in (*model.parameters(), *state, *scales)]


def assert_equal(ours, theirs) -> None:
    assert all(map(torch.equal, ours, theirs))


@pytest.fixture
def interpreted(monkeypatch):
    """The optimizer on Triton's kernels, in the interpreter, and a list of what it launches."""
    if torch.cuda.is_available():
        pytest.skip("the interpreter is for machines without GPU")
    from deltadiff.kernels import adamw_step, delta_update, step_counters

    path = Dispatch("triton", "for the test")
    monkeypatch.setattr("deltadiff.optim.device_step.choose_path", lambda *_: path)
    monkeypatch.setattr("deltadiff.optim.weight_launches.choose_path", lambda *_: path)
    launched = []
    for module in (adamw_step, delta_update, step_counters):

        def counting(kernel, *args, real=module.launch_cached, **options):
            launched.append(kernel.fn.__name__)
            real(kernel, *args, **options)

        monkeypatch.setattr(module, "launch_cached", counting)
    return launched


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_step_is_three_launches(interpreted, w_update):
    model = make_model()
    optimizer = DeltaLoRA(model, start_step=1, w_update=w_update)
    expected = ["_adamw_step_kernel", "_delta_update_kernel", "_advance_counters_kernel"]
    if w_update == "factored":
        del expected[1]
    for t in range(5):
        del interpreted[:]
        step(model, optimizer, t, missing=(1,) if t == 2 else ())
        known = t < 2 and w_update == "inplace"  # W is surely not updated yet
        assert interpreted == [k for k in expected if not (known and "delta" in k)]


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("skip", [False, True])
def test_kernels_and_reference_agree(interpreted, monkeypatch, w_update, skip):
    """Over the first steps, with missing gradients, skipped steps, and lr and lambda changing."""
    results = []
    for backend in ("triton", "reference"):
        path = Dispatch(backend, "for the test")
        monkeypatch.setattr("deltadiff.optim.device_step.choose_path", lambda *_, path=path: path)
        monkeypatch.setattr(
            "deltadiff.optim.weight_launches.choose_path", lambda *_, path=path: path
        )
        model = make_model()
        groups = [
            {"params": list(model[0].parameters())[-2:]},
            {"params": model[2], "lr": 3e-3, "start_step": 2},
            {"params": model[3], "update_ratio": 0.0},
        ]
        optimizer = DeltaLoRA(
            groups, update_ratio=1.0, w_update=w_update, skip_nonfinite=skip, model=model
        )
        for t in range(8):
            optimizer.param_groups[0]["lr"] = 1e-2 / (1 + t)
            optimizer.param_groups[1]["update_ratio"] = 1.0 if t < 6 else 0.5
            for p, grad in zip(trainable(model), make_grads(trainable(model), t), strict=True):
                p.grad = grad
            if t in (1, 4):
                model[0].lora_A.grad = None
            if skip and t in (2, 5):
                model[2].lora_B.grad[0, 0] = float("inf")
            optimizer.step()
        results.append(everything(model, optimizer))
        assert optimizer.state_dict()["param_groups"][0]["deltadiff.iteration"] == (
            6 if skip else 8
        )
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_tables_are_made_once_and_gradients_may_be_anywhere(interpreted, monkeypatch):
    model, other = make_model(), make_model()
    prepared, sent = [], []

    def preparing(*args, real=device_step.prepare_adamw_step):
        prepared.append(args)
        return real(*args)

    def sending(values, target, real=device_step.copy_async):
        sent.append(values)
        return real(values, target)

    monkeypatch.setattr(device_step, "prepare_adamw_step", preparing)
    monkeypatch.setattr(device_step, "copy_async", sending)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0)
    step(model, optimizer, 0)
    assert len(prepared) == len(sent) == 1
    for p, grad in zip(trainable(model), make_grads(trainable(model), 1), strict=True):
        p.grad.copy_(grad)  # where they were: nothing is sent
    optimizer.step()
    assert len(sent) == 1
    held = [p.grad for p in trainable(model)]  # so that no new gradient gets an old one's memory
    for t in range(2, 4):
        step(model, optimizer, t)
        held += [p.grad for p in trainable(model)]
    assert len(prepared) == 1 and len(sent) == 3
    plain = DeltaLoRA(other, lr=1e-2, update_ratio=1.0)
    for t in range(4):
        step(other, plain, t)
    for ours, theirs in zip(everything(model, optimizer), everything(other, plain), strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_tensors_that_moved_are_found(interpreted):
    results = []
    for moving in (False, True):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0)
        for t in range(6):
            if moving and t == 2:
                model[0].lora_A.data = model[0].lora_A.data.clone()
            if moving and t == 3:
                model[0].weight.data = model[0].weight.data.clone()
            if moving and t == 4:
                weight = model[2].weight.detach().clone()
                model[2].weight = nn.Parameter(weight, requires_grad=False)
            step(model, optimizer, t, missing=(2, 3) if t == 5 else ())
        results.append(everything(model, optimizer))
    assert_equal(*results)


def test_gradients_that_kernels_cannot_read_as_they_are(interpreted):
    results = []
    for strange in (False, True):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2)
        for t in range(3):
            for p, grad in zip(trainable(model), make_grads(trainable(model), t), strict=True):
                p.grad = grad.T.contiguous().T if strange and grad.dim() == 2 else grad
            optimizer.step()
        results.append(everything(model, optimizer))
    assert_equal(*results)


def test_lr_as_a_tensor(interpreted):
    results = []
    for lr in (1e-2, torch.tensor(1e-2, dtype=torch.float64)):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for t in range(4):
            step(model, optimizer, t)
            schedule.step()
        results.append(everything(model, optimizer))
    assert_equal(*results)
    assert optimizer.param_groups[0]["lr"] is lr
    with pytest.raises(ArgumentTypeError, match="lr: got .*0-dim"):
        DeltaLoRA(make_model(), lr=torch.tensor([1e-2]))


# ---------------------------------------------------------------------- CUDA graphs


def change(optimizer, t, lr) -> None:
    group = optimizer.param_groups[0]
    group["lr"] = lr.fill_(1e-2 / (1 + t)) if isinstance(lr, torch.Tensor) else 1e-2 / (1 + t)
    if optimizer.w_update == "inplace":
        group["update_ratio"] = 1.0 if t < 6 else 0.25


@pytest.mark.gpu
@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("warm_up", [1, 4])  # before and after W is first updated
@pytest.mark.parametrize("tensor_lr", [False, True])
def test_replays_are_steps(w_update, warm_up, tensor_lr):
    results = []
    for captured in (False, True):
        model = make_model("cuda")
        lr = torch.tensor(1e-2, device="cuda") if tensor_lr else 1e-2
        optimizer = DeltaLoRA(model, lr=lr, update_ratio=1.0, start_step=2, w_update=w_update)
        params = trainable(model)
        for t in range(warm_up):
            change(optimizer, t, lr)
            step(model, optimizer, t)
        for p in params:
            p.grad = torch.zeros_like(p)
        graph = torch.cuda.CUDAGraph()
        if captured:
            with torch.cuda.graph(graph):
                optimizer.step()
        grads = [p.grad for p in params]
        for t in range(warm_up, 10):
            change(optimizer, t, lr)
            if captured and t == 8:
                step(model, optimizer, t)  # an eager one between, with gradients of its own
                continue
            for kept, grad in zip(grads, make_grads(params, t), strict=True):
                kept.copy_(grad)
            if captured:
                optimizer.send_param_groups()
                graph.replay()
            else:
                for p, kept in zip(params, grads, strict=True):
                    p.grad = kept
                optimizer.step()
        results.append(everything(model, optimizer))
        assert optimizer.state_dict()["param_groups"][0]["deltadiff.iteration"] == 10
    assert_equal(*results)


@pytest.mark.gpu
def test_capture_refuses_what_a_replay_could_not_follow():
    model = make_model("cuda")
    optimizer = DeltaLoRA(model, lr=1e-2)
    for p in trainable(model):
        p.grad = torch.ones_like(p)
    with pytest.raises(ArgumentError, match="before any step"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
    optimizer.step()
    optimizer.param_groups[0]["lr"] = 1e-3
    with pytest.raises(ArgumentError, match="send_param_groups"):
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            optimizer.step()
