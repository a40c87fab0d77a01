"""Layers with `lora_dropout`: their masks, swapping, adapters; and rsLoRA's scaling."""

import peft
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltadiff import DeltaLoRA, load_adapter, save_adapter, swap_, unswap_
from deltadiff.errors import ArgumentError, ArgumentTypeError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ops.reference import lora_linear_ref

P = 0.3


def make_model(device="cpu", p=P, dtype=torch.float32, **options):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.Linear(24, 24))
    model = model.to(device, dtype)
    swap_(model, r=3, lora_dropout=p, seed=0, **options)
    for layer in (model[0], model[2], model[3]):
        nn.init.normal_(layer.lora_B)
    return model


def gradients(model):
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def test_masks_follow_the_mode_and_the_generator(randn):
    model, x = make_model(), randn(8, 24)
    plain = make_model(p=0.0)
    with torch.no_grad():
        torch.manual_seed(5)
        first, second = model(x), model(x)
        torch.manual_seed(5)
        assert torch.equal(model(x), first) and torch.equal(model(x), second)
        assert not torch.equal(first, second)
        model.eval()
        assert torch.equal(model(x), plain(x)) and torch.equal(model(x), model(x))


def test_a_layer_sees_the_mask_of_the_seed_that_it_draws(randn):
    layer, x = make_model()[0], randn(8, 24)
    torch.manual_seed(5)
    y = layer(x)
    torch.manual_seed(5)
    seed = torch.randint(2**63 - 1, ())
    expected = lora_linear_ref(
        x, layer.weight, layer.lora_A, layer.lora_B, scaling=layer.scaling, bias=layer.bias,
        dropout=P, seed=seed,
    )  # fmt: skip
    torch.testing.assert_close(y, expected)


def test_each_layer_and_each_pass_has_its_own_mask():
    model = nn.Sequential(*(nn.Linear(64, 64, bias=False) for _ in range(2)))
    swap_(model, r=2, lora_dropout=0.5)
    masks = []
    for layer in (*model, *model):
        layer.weight.data.zero_()
        nn.init.ones_(layer.lora_A)
        nn.init.ones_(layer.lora_B)
        x = torch.ones(64, 64, requires_grad=True)
        (dx,) = torch.autograd.grad(layer(x).sum(), x)
        masks.append(dx != 0)
    for i, a in enumerate(masks):
        for b in masks[:i]:  # independent masks agree in half of 4096 places, within 5 sigma
            assert abs((a == b).sum().item() - 2048) < 5 * 32


@pytest.mark.parametrize("reentrant", [True, False])
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_checkpointing_makes_the_same_masks_again(device, reentrant, randn):
    model, found = make_model(device), []
    x = randn(16, 24, device=device).requires_grad_()
    for checkpointed in (False, True):
        model.zero_grad()
        x.grad = None
        torch.manual_seed(5)
        h = x
        for block in (model[:2], model[2:]):
            h = checkpoint(block, h, use_reentrant=reentrant) if checkpointed else block(h)
        h.square().sum().backward()
        found.append({**gradients(model), "x": x.grad.clone()})
    assert found[0].keys() == found[1].keys()
    for name, grad in found[0].items():
        assert torch.equal(grad, found[1][name]), name


def test_training_with_dropout_learns(randn):
    model = make_model(p=0.1)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0)
    x, target = randn(64, 24), randn(64, 24)
    losses = []
    for _ in range(60):
        optimizer.zero_grad()
        loss = (model(x) - target).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]


def test_delta_lora_refuses_dropout():
    model = make_model()
    with pytest.raises(ArgumentError, match="0 with lora_dropout=0.3.*update_ratio=0"):
        DeltaLoRA(model, update_ratio=0.5)
    groups = [{"params": model[0], "update_ratio": 0}, {"params": model[2]}]
    with pytest.raises(ArgumentError, match="with lora_dropout=0.3"):
        DeltaLoRA(groups)
    DeltaLoRA(groups[:1])
    model[2].lora_dropout = 0.0  # layers may differ, PEFT's for instance
    DeltaLoRA(groups)


def test_a_delta_in_the_branch_has_no_dropout(tmp_path, randn):
    """Dropout must not reach a branch that stands for a part of W."""
    trained = make_model(p=0.0)
    optimizer = DeltaLoRA(trained, lr=1e-2)
    for _ in range(3):
        trained(randn(8, 24)).sum().backward()
        optimizer.step()
    save_adapter(trained, tmp_path)
    model = make_model()
    load_adapter(model, tmp_path)
    with pytest.raises(SwapError, match="lora_dropout=0.3 on a layer whose branch holds"):
        model(randn(8, 24))
    assert model.eval()(randn(8, 24)).isfinite().all()


# ------------------------------------------------------------------------- swapping


@pytest.mark.parametrize(
    "p, kind",
    [(-0.1, ArgumentError), (1.0, ArgumentError), (float("nan"), ArgumentError),
     (True, ArgumentTypeError), ("0.1", ArgumentTypeError)],
)  # fmt: skip
def test_swap_refuses(p, kind):
    with pytest.raises(kind, match="lora_dropout"):
        swap_(nn.Sequential(nn.Linear(4, 4)), r=1, lora_dropout=p)
    with pytest.raises(ArgumentTypeError, match="use_rslora"):
        swap_(nn.Sequential(nn.Linear(4, 4)), r=1, use_rslora=1)


def test_swap_says_it():
    model = make_model(p=0.25)
    assert "lora_dropout=0.25" in repr(model[0]) and model[0].lora_dropout == 0.25
    assert "lora_dropout" not in repr(make_model(p=0.0)[0])


def peft_model(**options) -> nn.Module:
    torch.manual_seed(0)
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=["0", "2"], **options)
    return peft.get_peft_model(nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6)), config)


def test_peft_layers_keep_their_dropout():
    model = peft_model(lora_dropout=0.25)
    with pytest.raises(ArgumentError, match="lora_dropout: got 0.5; accepted: the default"):
        swap_(model, lora_dropout=0.5)
    swap_(model)
    assert {layer.lora_dropout for layer in lora_layers(model).values()} == {0.25}
    with pytest.raises(ArgumentError, match="base_model.model.0 with lora_dropout=0.25"):
        DeltaLoRA(model)
    unswap_(model)
    assert model.base_model.model[0].lora_dropout["default"].p == 0.25
    with pytest.warns(UserWarning, match="its dropout is Dropout"):
        swap_(peft_model(lora_dropout=1.0))


def test_the_expectation_is_that_of_peft(randn):
    """Over many masks, both have the same variance and the mean of the layer without dropout."""
    peft_layers, p, x = peft_model(lora_dropout=0.5), 0.5, randn(1, 8)
    layer = peft_layers.base_model.model[0]
    nn.init.normal_(layer.lora_B["default"].weight)
    draws = 4000
    with torch.no_grad():
        theirs = layer(x.expand(draws, 8))  # a mask for each row
        swap_(peft_layers)
        ours = peft_layers.base_model.model[0].train()
        found = ours(x.expand(draws, 8))
        exact = ours.eval()(x)
        (s, a, b) = (m["default"] for m in (ours.scaling, ours.lora_A, ours.lora_B))
        a, b = a.weight, b.weight
        # Var(m / (1 - p)) = p / (1 - p)
        variance = ((s * x[0] * (b @ a)) ** 2).sum(1) * p / (1 - p)
    for y in (found, theirs):
        assert ((y.mean(0) - exact[0]).abs() < 5 * (variance / draws).sqrt()).all()
        # the fourth moment of such a sum is at most max(3, that of m / (1 - p)) = 3 variances^2
        assert ((y.var(0) - variance).abs() < 5 * variance * (2 / draws) ** 0.5).all()


def test_rslora_scales_as_peft():
    theirs = peft_model(use_rslora=True)
    model = nn.Sequential(nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 6))
    swap_(model, r=4, lora_alpha=6, use_rslora=True)
    scaling = theirs.base_model.model[0].scaling["default"]
    assert model[0].scaling == scaling == 6 / 4**0.5 and model[0].lora_alpha == 6
    swap_(theirs)
    swapped = lora_layers(theirs)["base_model.model.0"]
    assert swapped.scaling == scaling and swapped.lora_alpha == 6


@pytest.mark.parametrize("use_rslora", [False, True])
def test_an_adapter_keeps_scaling_alpha_and_dropout(use_rslora, tmp_path, randn):
    options = {"lora_alpha": 5, "use_rslora": use_rslora}
    model, x = make_model(p=0.25, **options), randn(4, 24)
    save_adapter(model, tmp_path)
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(24, 40), nn.GELU(), nn.Linear(40, 24), nn.Linear(24, 24))
    load_adapter(base, tmp_path)
    for layer, twin in ((model[0], base[0]), (model[3], base[3])):
        for name in ("r", "lora_alpha", "scaling", "lora_dropout"):
            assert getattr(layer, name) == getattr(twin, name), name
    assert torch.equal(model.eval()(x), base.eval()(x))
    other = make_model(p=0.5)  # it is swapped already and keeps its own dropout
    load_adapter(other, tmp_path)
    assert other[0].lora_dropout == 0.5 and other[0].scaling == model[0].scaling


@pytest.mark.gpu
def test_a_captured_layer_has_a_new_mask_at_each_replay():
    layer = make_model("cuda", 0.5, torch.bfloat16)[0]
    nn.init.ones_(layer.lora_A)
    nn.init.ones_(layer.lora_B)
    layer.weight.data.zero_()
    x = torch.ones(64, 24, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    torch.autograd.grad(layer(x).sum(), x)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        y = layer(x)
        (dx,) = torch.autograd.grad(y.sum(), x)
    masks = []
    for _ in range(3):
        graph.replay()
        masks.append(dx != 0)
        seen = masks[-1].sum(1) * 2 * layer.r * layer.scaling  # of x / (1 - p), by each row of y
        torch.testing.assert_close(y[:, 0].float(), seen.float() + layer.bias[0].float(),
                                   rtol=2**-7, atol=2**-7)  # fmt: skip
    assert not torch.equal(masks[0], masks[1]) and not torch.equal(masks[1], masks[2])
