"""`DeltaLoRA` against Algorithm 1 written out with `torch.optim.AdamW`."""

import copy
import io
import warnings

import pytest
import torch
from torch import nn

import deltadiff
from deltadiff import DeltaLoRA, LoraLinear, swap_, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.lora_linear import lora_layers
from deltadiff.layers.merge import branch_products
from deltadiff.ops.reference import join_remainder

W_UPDATES = ["inplace", "factored"]
ROUNDINGS = ["remainder", "stochastic", "nearest"]


def make_model(dtype=torch.float64, device="cpu") -> nn.Sequential:
    torch.manual_seed(0)
    layers = nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 16), nn.Tanh(), nn.Linear(16, 3)
    model = nn.Sequential(*layers).to(device, dtype)
    swap_(model, r=4, lora_alpha=8, target_modules=["0", "2"], modules_to_save=["4"], seed=1)
    return model


def batch(t: int, model: nn.Module) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(t)
    like = model[0].weight
    x, y = (torch.randn(8, n, generator=generator, dtype=torch.float64) for n in (12, 3))
    return x.to(like), y.to(like)


def loss_of(model: nn.Module, t: int) -> torch.Tensor:
    x, y = batch(t, model)
    return (model(x) - y).square().mean()


def train(model, optimizer, steps, ratio_at=None, start=0, lr_at=None) -> list[float]:
    losses = []
    for t in range(start, start + steps):
        if lr_at:
            for group in optimizer.param_groups:
                group["lr"] = lr_at(t)
        if ratio_at:
            for group in optimizer.param_groups:
                group["update_ratio"] = ratio_at(t)
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def algorithm_1(steps, start_step, ratio_at, lr=1e-2, weight_decay=0.01):
    """The paper's algorithm, with W += lambda s (B'A' - BA) as it stands there."""
    model = make_model()
    optimizer = torch.optim.AdamW(
        [p for p in model.parameters() if p.requires_grad], lr=lr, weight_decay=weight_decay
    )
    layers, losses = lora_layers(model).values(), []
    for t in range(steps):
        optimizer.zero_grad()
        loss = loss_of(model, t)
        loss.backward()
        losses.append(loss.item())
        before = [(m.lora_B @ m.lora_A).detach() for m in layers]
        optimizer.step()
        if t > start_step:
            with torch.no_grad():
                for m, ba in zip(layers, before, strict=True):
                    m.weight += ratio_at(t) * m.scaling * (m.lora_B @ m.lora_A - ba)
    return model, losses


def output(model: nn.Module) -> torch.Tensor:
    with torch.no_grad():
        return model(batch(10_000, model)[0])


@pytest.mark.parametrize("start_step", [0, 1, 7])
def test_both_forms_are_algorithm_1_over_200_steps(start_step):
    reference, losses = algorithm_1(200, start_step, lambda t: 0.5)
    for w_update in W_UPDATES:
        model = make_model()
        w0 = model[0].weight.detach().clone()
        optimizer = DeltaLoRA(
            model, lr=1e-2, update_ratio=0.5, start_step=start_step, w_update=w_update
        )
        assert train(model, optimizer, 200) == pytest.approx(losses, abs=1e-12, rel=0)
        torch.testing.assert_close(output(model), output(reference), atol=1e-12, rtol=0)
        if w_update == "factored":
            assert torch.equal(model[0].weight, w0)
        else:
            torch.testing.assert_close(
                model[0].weight, reference[0].weight, atol=1e-12, rtol=0, check_stride=False
            )


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_first_update_of_w_is_in_iteration_k_plus_1(w_update):
    """The paper's "t > K" with t from 0: K = 0 still skips the first step."""
    model = make_model()
    optimizer = DeltaLoRA(model, update_ratio=1.0, start_step=2, w_update=w_update)
    started = []
    for t in range(5):
        train(model, optimizer, 1, start=t)
        started.append(model[0].delta.started())
    assert started == [False, False, False, True, True]


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_changing_update_ratio(w_update):
    def ratio_at(t):
        return 0.5 if t < 20 else 0.0 if t < 30 else 1.25

    reference, losses = algorithm_1(60, 3, ratio_at)
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, start_step=3, w_update=w_update)
    assert train(model, optimizer, 60, ratio_at) == pytest.approx(losses, abs=1e-12, rel=0)


def test_factored_refuses_endless_changes_of_update_ratio_before_changing_anything():
    model = make_model()
    optimizer = DeltaLoRA(model, update_ratio=0.5, w_update="factored")
    with pytest.raises(ArgumentError, match="update_ratio: got .* at most 8 changes"):
        train(model, optimizer, 20, ratio_at=lambda t: 0.5 + t)
    assert len(model[0].delta.past_updates) == 8


def test_update_ratio_0_is_plain_lora():
    reference, losses = algorithm_1(50, 0, lambda t: 0.0)
    model = make_model()
    w0 = model[0].weight.detach().clone()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0)
    assert train(model, optimizer, 50) == pytest.approx(losses, abs=1e-12, rel=0)
    assert torch.equal(model[0].weight, w0)


def test_delta_lora_from_the_first_step_is_nearly_lora_with_a_larger_alpha():
    """With updates from step 0 on and B_0 = 0, y = W_0 x + (1 + lambda) s B A x; the gradients of
    Adam do not notice the factor. K = 0 misses one step, so compare a run that starts past it."""
    lam = 0.5
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-3, update_ratio=lam, w_update="factored")
    train(model, optimizer, 30)
    delta = model[0].delta
    a, b, s = model[0].lora_A, model[0].lora_B, model[0].scaling
    exact = (1 + lam) * s * b @ a - lam * s * delta.anchor_B @ delta.anchor_A
    effective = branch_products(model[0])
    torch.testing.assert_close(sum(p.B @ p.A for p in effective), exact)


def test_param_groups_scheduler_and_clipping():
    """Groups with their own lr, an LR schedule and clipping, against `torch.optim.AdamW`."""
    results = []
    for ours in (True, False):
        model = make_model()
        pairs = [p for m in lora_layers(model).values() for p in (m.lora_A, m.lora_B)]
        groups = [
            {"params": pairs, "lr": 1e-2},
            {"params": list(model[4].parameters()), "lr": 1e-3, "weight_decay": 0.5},
        ]
        if ours:
            optimizer = DeltaLoRA(groups, update_ratio=0.0, model=model)
        else:
            optimizer = torch.optim.AdamW(groups, weight_decay=0.01)
        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda t: 1 / (1 + t))
        for t in range(20):
            optimizer.zero_grad(set_to_none=bool(t % 2))
            for micro in range(3):
                (loss_of(model, 3 * t + micro) / 3).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
            scheduler.step()
        results.append(output(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def test_groups_may_name_modules_and_ratios():
    model = make_model()
    optimizer = DeltaLoRA(
        [
            {"params": model[0], "update_ratio": 2.0, "start_step": 1},
            {"params": model[2], "update_ratio": 0.0},
            {"params": model[4]},
        ]
    )
    before = [model[i].weight.detach().clone() for i in (0, 2)]
    train(model, optimizer, 4)
    assert not torch.equal(model[0].weight, before[0])
    assert torch.equal(model[2].weight, before[1])


def test_accumulated_gradients_make_one_delta():
    results = []
    for pieces in (1, 4):
        model = make_model()
        optimizer = DeltaLoRA(model, update_ratio=1.0, lr=1e-2)
        for t in range(10):
            optimizer.zero_grad()
            x, y = batch(t, model)
            for xs, ys in zip(x.chunk(pieces), y.chunk(pieces), strict=True):
                ((model(xs) - ys).square().mean() / pieces).backward()
            optimizer.step()
        results.append(model[0].weight.detach())
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


def snapshot(model, optimizer) -> list[torch.Tensor]:
    state = [t for s in optimizer.state.values() for t in s.values()]
    iteration = list(optimizer._iteration.values())
    return [t.detach().clone() for t in [*model.parameters(), *state, *iteration]]


@pytest.mark.parametrize("how", ["grad_scaler", "skip_nonfinite"])
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_a_skipped_step_changes_nothing(w_update, how):
    """A run with skipped steps equals the run without them, bit for bit."""
    results = []
    for broken in (set(), {0, 1, 4, 7}):  # 4: the iteration that would update W first
        model = make_model(torch.float32)
        model[0].weight.data = model[0].weight.data.clone()
        optimizer = DeltaLoRA(
            model, lr=1e-2, update_ratio=1.0, start_step=1, w_update=w_update,
            skip_nonfinite=how == "skip_nonfinite",
        )  # fmt: skip
        scaler = torch.amp.GradScaler("cpu", init_scale=4.0, growth_interval=10**6)
        scaler = scaler if how == "grad_scaler" else torch.amp.GradScaler("cpu", enabled=False)
        done, t = 0, 0
        while done < 8:
            optimizer.zero_grad()
            scaler.scale(loss_of(model, done)).backward()
            if t in broken:
                model[2].lora_A.grad[0, 0] = float("nan")
                before = snapshot(model, optimizer)
            scaler.step(optimizer)
            if how == "grad_scaler":
                scaler.update(4.0)
            if t in broken:
                for old, new in zip(before, snapshot(model, optimizer), strict=True):
                    assert torch.equal(old, new)
            else:
                done += 1
            t += 1
        results.append(output(model))
    assert torch.equal(*results)


def test_a_skipped_step_is_remembered_when_skipping_ends():
    """The host cannot know that the first step was skipped; W must still start at t > K."""
    results = []
    for broken in (False, True):
        model = make_model()
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, start_step=3, skip_nonfinite=broken)
        if broken:
            loss_of(model, 0).backward()
            model[2].lora_A.grad[0, 0] = float("inf")
            optimizer.step()
            optimizer.skip_nonfinite = False
        train(model, optimizer, 8)
        results.append(output(model))
    assert torch.equal(*results)


def test_without_gradients_nothing_happens():
    model = make_model()
    optimizer = DeltaLoRA(model)
    before = snapshot(model, optimizer)
    optimizer.step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


def test_parameters_without_gradient_keep_their_own_step_count():
    results = []
    for kind in (DeltaLoRA, torch.optim.AdamW):
        model = make_model()
        params = [p for p in model.parameters() if p.requires_grad]
        options = {"update_ratio": 0.0} if kind is DeltaLoRA else {}
        optimizer = kind(params, lr=1e-2, weight_decay=0.01, **options)
        for t in range(10):
            optimizer.zero_grad()
            loss_of(model, t).backward()
            if t % 3:
                model[0].lora_A.grad = None
            optimizer.step()
        results.append(output(model))
    torch.testing.assert_close(*results, atol=1e-12, rtol=0)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_anchors_are_taken_without_gradients_too(w_update):
    """A layer that gets no gradient in iteration K + 1 still starts from its value there."""
    model = make_model()
    reference = make_model()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, start_step=1, w_update=w_update)
    for t in range(6):
        optimizer.zero_grad()
        loss_of(model, t).backward()
        if t in (2, 4):
            model[0].lora_A.grad = model[0].lora_B.grad = None
        if t == 2:
            at_start = (model[0].lora_B @ model[0].lora_A).detach()
        optimizer.step()
    layer = model[0]
    wanted = layer.scaling * (layer.lora_B @ layer.lora_A - at_start)
    if w_update == "inplace":
        torch.testing.assert_close(layer.weight - reference[0].weight, wanted)
    torch.testing.assert_close(layer.delta.anchor_B @ layer.delta.anchor_A, at_start)


@pytest.mark.parametrize("w_update", W_UPDATES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_state_dict_round_trip_resumes_exactly(w_update, dtype):
    def fresh():
        model = make_model(dtype)
        options = {"rounding": "stochastic"} if dtype == torch.bfloat16 else {}
        return model, DeltaLoRA(
            model, lr=1e-2, update_ratio=1.0, start_step=2, w_update=w_update, **options
        )

    def lr_at(t):
        return 1e-2 / (1 + t)

    model, optimizer = fresh()
    train(model, optimizer, 12, lr_at=lr_at)
    for cut in (1, 3, 7):
        first, first_optimizer = fresh()
        train(first, first_optimizer, cut, lr_at=lr_at)
        file = io.BytesIO()
        torch.save([first.state_dict(), first_optimizer.state_dict()], file)
        file.seek(0)
        weights, state = torch.load(file, weights_only=True)
        second, second_optimizer = fresh()
        second.load_state_dict(weights)
        second_optimizer.load_state_dict(state)
        assert torch.equal(output(second), output(first))
        train(second, second_optimizer, 12 - cut, start=cut, lr_at=lr_at)
        assert torch.equal(output(second), output(model))


def test_remainder_is_saved_with_the_state():
    model = make_model(torch.bfloat16)
    optimizer = DeltaLoRA(model, lr=1e-4, update_ratio=0.1)
    train(model, optimizer, 5)
    low = optimizer.state[model[0].lora_B]["remainder"]
    assert low.dtype == torch.int16 and low.any()
    other = make_model(torch.bfloat16)
    second = DeltaLoRA(other, lr=1e-4, update_ratio=0.1)
    second.load_state_dict(optimizer.state_dict())
    assert torch.equal(second.state[other[0].lora_B]["remainder"], low)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_share_of_the_update_that_reaches_a_bfloat16_weight(rounding):
    """remainder: all; stochastic: all on average; nearest: little (design: 1.5 % at 1e-5)."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(256, 256)).to(torch.bfloat16)
    nn.init.normal_(model[0].weight, std=0.02)
    swap_(model, r=8, lora_alpha=16)
    nn.init.normal_(model[0].lora_B, std=0.02)
    layer, w0 = model[0], model[0].weight.detach().float()
    optimizer = DeltaLoRA(
        model, lr=1e-5, weight_decay=0, update_ratio=1.0, rounding=rounding, seed=3
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(9):
            layer.lora_A.grad = torch.randn_like(layer.lora_A)
            layer.lora_B.grad = torch.randn_like(layer.lora_B)
            optimizer.step()
    delta = layer.delta
    wanted = layer.scaling * (layer.lora_B @ layer.lora_A - delta.anchor_B @ delta.anchor_A)
    got = layer.weight.float() - w0
    if rounding == "remainder":
        got = join_remainder(layer.weight.detach(), delta.remainder) - w0
        assert (got - wanted).norm() / w0.norm() < 1e-7
    share = ((got * wanted).sum() / wanted.square().sum()).item()
    low, high = {"remainder": (0.9999, 1.0001), "stochastic": (0.8, 1.2), "nearest": (0, 0.1)}[
        rounding
    ]
    assert low < share < high


def test_nearest_warns_once_with_the_share_lost():
    model = make_model(torch.bfloat16)
    optimizer = DeltaLoRA(model, lr=1e-5, update_ratio=1.0, rounding="nearest")
    with pytest.warns(UserWarning, match=r"lost \d+\.\d% of the first weight update") as caught:
        train(model, optimizer, 10)
    assert len(caught) == 1


def test_quantised_weight_is_served_by_factored_and_refused_in_place():
    class Int8Linear(nn.Linear):
        """A stand-in for a quantised layer: int8 weight, its own forward."""

        def forward(self, x):
            return nn.functional.linear(x, self.weight.to(x.dtype) / 64, self.bias)

    model = nn.Sequential(Int8Linear(12, 10))
    q = (torch.randn(10, 12) * 16).to(torch.int8)
    model[0].weight = nn.Parameter(q, requires_grad=False)
    report = swap_(model, r=2)
    assert "base layer's own product" in report.rows[0].reason
    with pytest.raises(ArgumentTypeError, match="weight of 0.*quantised"):
        DeltaLoRA(model)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update="factored")
    x, y = torch.randn(16, 12), torch.randn(16, 10)
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = (model(x) - y).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < losses[0] and torch.equal(model[0].weight, q)


def tied_model():
    model = nn.Sequential()
    model.embed, model.head = nn.Embedding(20, 8), nn.Linear(8, 20, bias=False)
    model.head.weight = model.embed.weight
    return model


def test_tied_and_shared_weights_are_refused_in_place_only():
    model = tied_model()
    swap_(model, r=2, target_modules=["head"])
    with pytest.raises(ArgumentError, match="weight of head: got shared by embed, head"):
        DeltaLoRA(model)
    DeltaLoRA(model, w_update="factored")
    two = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    two[1].weight = two[0].weight
    swap_(two, r=2)
    with pytest.raises(ArgumentError, match="shared by 0, 1"):
        DeltaLoRA(two)


BAD = [
    ({"lr": float("nan")}, "lr: got nan"),
    ({"lr": -1.0}, "lr: got -1.0"),
    ({"betas": (0.9, 1.0)}, "betas"),
    ({"betas": 0.9}, "betas"),
    ({"eps": -1e-8}, "eps"),
    ({"weight_decay": float("inf")}, "weight_decay"),
    ({"update_ratio": -0.5}, "update_ratio"),
    ({"update_ratio": "2"}, "update_ratio"),
    ({"start_step": 1.0}, "start_step: got 1.0"),
    ({"start_step": -1}, "start_step"),
    ({"start_step": True}, "start_step"),
    ({"w_update": "in-place"}, "w_update"),
    ({"rounding": "up"}, "rounding"),
    ({"seed": -1}, "seed"),
]


@pytest.mark.parametrize(("options", "message"), BAD)
def test_bad_options(options, message):
    with pytest.raises(ArgumentError, match=message):
        DeltaLoRA(make_model(), **options)


@pytest.mark.parametrize("given", [3, "model", [3], [{"lr": 1.0}]])
def test_bad_model_or_params(given):
    with pytest.raises(ArgumentTypeError, match="model_or_params"):
        DeltaLoRA(given)


def test_parameters_without_swapped_layers_are_refused():
    with pytest.raises(ArgumentError, match="update_ratio=0"):
        DeltaLoRA(nn.Linear(3, 3))
    with pytest.raises(ArgumentError, match="update_ratio=0"):
        DeltaLoRA(list(make_model().parameters()))
    model = make_model()
    with pytest.raises(ArgumentError, match="lora_A and lora_B of 0 not both"):
        DeltaLoRA([model[0].lora_A], model=model)


def test_empty_parameter_is_refused():
    model = make_model()
    model[4].bias = nn.Parameter(torch.empty(0))
    with pytest.raises(ArgumentTypeError, match="no shard"):
        DeltaLoRA(model)


@pytest.mark.parametrize("name", ["lr", "start_step", "update_ratio"])
def test_bad_value_in_a_later_step_changes_nothing(name):
    model = make_model()
    optimizer = DeltaLoRA(model)
    train(model, optimizer, 3)
    loss_of(model, 0).backward()
    before = snapshot(model, optimizer)
    optimizer.param_groups[0][name] = {"lr": float("nan"), "start_step": 9, "update_ratio": -1}[
        name
    ]
    with pytest.raises(ArgumentError, match=name):
        optimizer.step()
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


@pytest.mark.parametrize("take_out", [unswap_, deltadiff.merge_])
def test_stepping_after_the_layers_are_gone_is_an_error(take_out):
    model = make_model()
    optimizer = DeltaLoRA(model)
    train(model, optimizer, 3)
    loss_of(model, 0).backward()
    take_out(model)
    with pytest.raises(SwapError, match="un-swapped or merged"):
        optimizer.step()


def test_foreign_state_dict_is_refused():
    model = make_model()
    optimizer = DeltaLoRA(model)
    train(model, optimizer, 3)
    before = snapshot(model, optimizer)
    adamw = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    other = DeltaLoRA(make_model(), w_update="factored")
    bad = copy.deepcopy(optimizer.state_dict())
    bad["state"][0]["exp_avg"] = torch.zeros(1)
    for state in (adamw.state_dict(), other.state_dict(), bad):
        with pytest.raises(ArgumentError, match="state_dict"):
            optimizer.load_state_dict(state)
    assert all(map(torch.equal, before, snapshot(model, optimizer)))


@pytest.mark.parametrize("first", W_UPDATES)
@pytest.mark.parametrize("second", W_UPDATES)
def test_a_second_run_keeps_what_the_first_one_did(first, second):
    model = make_model()
    train(model, DeltaLoRA(model, lr=1e-2, update_ratio=1.0, w_update=first), 10)
    before = output(model)
    optimizer = DeltaLoRA(model, lr=1e-9, weight_decay=0, update_ratio=0.5, w_update=second)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    optimizer.step()
    torch.testing.assert_close(output(model), before, atol=1e-6, rtol=0)


def test_a_second_run_keeps_the_remainder_of_the_first():
    model = make_model(torch.bfloat16)
    train(model, DeltaLoRA(model, lr=1e-4, update_ratio=0.1), 5)
    low = model[0].delta.remainder.clone()
    optimizer = DeltaLoRA(model, lr=0.0, weight_decay=0, update_ratio=0.1)
    train(model, optimizer, 3)
    assert low.any() and torch.equal(optimizer.state[model[0].lora_B]["remainder"], low)


def test_layers_that_join_later_are_anchored_where_they_join():
    model = make_model()
    nn.init.normal_(model[2].lora_B)
    optimizer = DeltaLoRA([{"params": model[0]}], lr=1e-2, update_ratio=1.0, w_update="factored")
    train(model, optimizer, 5)
    before = output(model)
    optimizer.add_param_group({"params": model[2], "lr": 0.0})
    train(model, optimizer, 1)
    layer = model[2]
    torch.testing.assert_close(
        layer.delta.anchor_B @ layer.delta.anchor_A, layer.lora_B @ layer.lora_A
    )
    assert isinstance(layer, LoraLinear) and before.shape == output(model).shape
    bad = {"params": [nn.Parameter(torch.zeros(0))]}
    with pytest.raises(ArgumentTypeError):
        optimizer.add_param_group(bad)
    assert len(optimizer.param_groups) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_gpu_run_equals_cpu_run(w_update):
    losses = []
    for device in ("cpu", "cuda"):
        model = make_model(torch.float32, device)
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, start_step=1, w_update=w_update)
        losses.append(train(model, optimizer, 50))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_gpu_step_never_waits_for_the_device(w_update, rounding):
    model = make_model(torch.bfloat16, "cuda")
    optimizer = DeltaLoRA(
        model, lr=1e-2, update_ratio=1.0, w_update=w_update, rounding=rounding, skip_nonfinite=True
    )
    x, y = batch(0, model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for t in range(6):
            torch.cuda.set_sync_debug_mode("error" if t > 2 else "default")
            try:
                (model(x) - y).square().mean().backward()
                optimizer.step()
                optimizer.zero_grad()
            finally:
                torch.cuda.set_sync_debug_mode("default")
