"""`DeltaLoRA` against Algorithm 1 written out with `torch.optim.AdamW`."""

import pytest
import torch
from delta_lora_runs import (
    W_UPDATES,
    batch,
    loss_of,
    make_model,
    output,
    snapshot,
    train,
    trainable,
)
from torch import nn

import deltadiff
from deltadiff import DeltaLoRA, LoraLinear, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.merge import branch_products


def algorithm_1(steps, start_step, ratio_at, lr=1e-2, weight_decay=0.01):
    """The paper's algorithm, with W += lambda s (B'A' - BA) as it stands there."""
    model = make_model()
    optimizer = torch.optim.AdamW(trainable(model), lr=lr, weight_decay=weight_decay)
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


def test_update_ratio_0_is_plain_lora():
    reference, losses = algorithm_1(50, 0, lambda t: 0.0)
    model = make_model()
    w0 = model[0].weight.detach().clone()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0)
    assert train(model, optimizer, 50) == pytest.approx(losses, abs=1e-12, rel=0)
    assert torch.equal(model[0].weight, w0)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_delta_lora_from_the_start_is_lora_with_a_larger_alpha(w_update):
    """Where the first step moves nothing, the sum of all updates is lambda s B A, because B_0 = 0.

    The gradients of LoRA with alpha (1 + lambda) are 1 + lambda times as large, which Adam does not
    notice, but for eps.
    """
    ratio, results = 0.5, []
    for factor, update_ratio in ((1.0, ratio), (1 + ratio, 0.0), (1.0, 0.0)):
        model = make_model()
        for m in lora_layers(model).values():
            m.scaling *= factor
        optimizer = DeltaLoRA(
            model, eps=1e-12, weight_decay=0.1, update_ratio=update_ratio, w_update=w_update
        )
        train(model, optimizer, 40, lr_at=lambda t: 1e-2 if t else 0.0)
        results.append(output(model))
    ours, larger_alpha, plain = results
    torch.testing.assert_close(ours, larger_alpha, atol=1e-6, rtol=0)
    assert (ours - plain).abs().max() > 1e-2


def test_all_that_is_added_to_w_is_the_telescoped_sum():
    ratio = 0.5
    model = make_model()
    optimizer = DeltaLoRA(model, lr=1e-3, update_ratio=ratio, w_update="factored")
    train(model, optimizer, 30)
    delta = model[0].delta
    a, b, s = model[0].lora_A, model[0].lora_B, model[0].scaling
    exact = (1 + ratio) * s * b @ a - ratio * s * delta.anchor_B @ delta.anchor_A
    torch.testing.assert_close(sum(p.B @ p.A for p in branch_products(model[0])), exact)


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


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_groups_of_modules_step_as_the_whole_model(w_update):
    results = []
    for parts in (lambda m: m, lambda m: [{"params": m[i]} for i in (0, 2, 4)]):
        model = make_model()
        train(model, DeltaLoRA(parts(model), lr=1e-2, update_ratio=1.0, w_update=w_update), 5)
        results.append([*model.parameters(), output(model)])
    assert all(map(torch.equal, *results))


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


BAD = [
    ({"lr": float("nan")}, "lr: got nan"),
    ({"betas": (0.9, 1.0)}, "betas"),
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


@pytest.mark.gpu
@pytest.mark.parametrize("w_update", W_UPDATES)
def test_gpu_run_equals_cpu_run(w_update):
    losses = []
    for device in ("cpu", "cuda"):
        model = make_model(torch.float32, device)
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=1.0, start_step=1, w_update=w_update)
        losses.append(train(model, optimizer, 50))
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
