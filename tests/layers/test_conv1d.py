"""GPT-2's `Conv1D`, which stores its weight (in, out), does everything that nn.Linear does."""

import copy

import peft
import pytest
import torch
from small_models import build, loss_of
from torch import nn
from transformers.pytorch_utils import Conv1D

from deltadiff import DeltaLoRA, load_adapter, lora_linear, merge_, save_adapter, swap_, unswap_
from deltadiff.finetune.weight_change import weight_update
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.ops.reference import join_remainder


def twins(dtype=torch.float32, device="cpu") -> tuple[nn.Module, nn.Module]:
    """The same network twice, made of Conv1D and of nn.Linear."""
    torch.manual_seed(0)
    linear = nn.Sequential(nn.Linear(12, 20), nn.Tanh(), nn.Linear(20, 8)).to(device, dtype)
    conv = nn.Sequential(Conv1D(20, 12), nn.Tanh(), Conv1D(8, 20)).to(device, dtype)
    with torch.no_grad():
        for i in (0, 2):
            conv[i].weight.copy_(linear[i].weight.T)
            conv[i].bias.copy_(linear[i].bias)
    return conv, linear


def train(model, optimizer, steps=5):
    for t in range(steps):
        x = torch.randn(8, 12, generator=torch.Generator().manual_seed(t), dtype=torch.float64)
        p = model[0].weight
        optimizer.zero_grad()
        model(x.to(p.device, p.dtype)).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_training_is_that_of_the_linear_twin(w_update):
    conv, linear = twins(torch.float64)
    for model in (conv, linear):
        swap_(model, r=3, seed=0)
        train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=w_update))
        layer, delta = model[0], model[0].delta.product()
        assert delta.B.shape == (20, 6) and delta.in_weight == (w_update == "inplace")
    for a, b in zip(conv[0::2], linear[0::2], strict=True):
        assert a.matrix.shape == (a.out_features, a.in_features) == b.weight.shape
        for x, y in ((a.matrix, b.weight), (a.lora_A, b.lora_A), (a.lora_B, b.lora_B)):
            torch.testing.assert_close(x, y, rtol=0, atol=1e-10)
    moved = not torch.equal(layer.weight, twins(torch.float64)[1][0].weight)
    assert moved == (w_update == "inplace")


def test_every_path_writes_the_update_into_a_transposed_weight(path, dtype):
    """W_T - W_0 = lambda s (B_T A_T - B_k A_k) to float32 accuracy, with the remainder of W."""
    conv, _ = twins(dtype, path.device)
    before = [conv[i].weight.detach().double().T for i in (0, 2)]
    swap_(conv, r=3, seed=0, backend=path.backend)
    optimizer = DeltaLoRA(conv, lr=1e-2, update_ratio=0.5)
    train(conv, optimizer)
    for layer, w_0 in zip(conv[0::2], before, strict=True):
        found = layer.matrix.detach()
        if dtype != torch.float32:
            low = optimizer.state[layer.lora_B]["remainder"]
            assert low.stride() == found.stride() and low.any()
            found = join_remainder(found, low)
        told = layer.delta.product()
        wanted = told.B.double() @ told.A.double()
        assert (found.double() - w_0 - wanted).norm() < 1e-4 * wanted.norm()


def test_merge_and_unswap():
    conv, linear = twins(torch.float64)
    before = copy.deepcopy(conv)
    for model in (conv, linear):
        swap_(model, r=3, seed=0)
        train(model, DeltaLoRA(model, lr=1e-2, update_ratio=0.5))
    x = torch.randn(4, 12, dtype=torch.float64)
    y = conv(x)
    reports = [merge_(model) for model in (conv, linear)]
    assert [r.shape for r in reports[0].rows] == [(20, 12), (8, 20)]
    assert isinstance(conv[0], Conv1D) and conv[0].weight.shape == (12, 20)
    torch.testing.assert_close(conv(x), y, atol=1e-12, rtol=0)
    for a, b in zip(conv[0::2], linear[0::2], strict=True):
        torch.testing.assert_close(a.weight.T, b.weight, atol=1e-10, rtol=0)

    swap_(before, r=3)
    layer = before[0]
    unswap_(before)
    assert isinstance(before[0], Conv1D) and before[0].weight is layer.weight


@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_an_adapter_of_gpt2(tmp_path, w_update):
    model = build("gpt2").double()
    report = swap_(model, r=2, seed=0)
    assert {row.module.rpartition(".")[2] for row in report.rows} == {"c_attn", "c_proj", "c_fc"}
    assert next(r for r in report.rows if r.module.endswith("c_attn")).shape == (48, 16)
    optimizer = DeltaLoRA(model, lr=1e-2, w_update=w_update)
    first = loss_of(model, range(8)).item()
    for _ in range(6):
        loss_of(model, range(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    last = loss_of(model, range(8)).item()
    assert last < first
    save_adapter(model, tmp_path)
    fresh = build("gpt2").double()
    load_adapter(fresh, tmp_path)
    assert loss_of(fresh, range(8)).item() == pytest.approx(last, abs=1e-12)
    merge_(fresh)
    assert not lora_layers(fresh)
    assert loss_of(fresh, range(8)).item() == pytest.approx(last, abs=1e-12)


@pytest.mark.parametrize("turn", [1, -1])
def test_an_adapter_of_one_layout_fits_the_other(tmp_path, turn):
    first, second = twins(torch.float64)[::turn]
    swap_(first, r=3, target_modules=["0"], modules_to_save=["2"], seed=0)
    train(first, DeltaLoRA(first, lr=1e-2, update_ratio=0.5))
    save_adapter(first, tmp_path)
    load_adapter(second, tmp_path)
    x = torch.randn(4, 12, dtype=torch.float64)
    torch.testing.assert_close(second(x), first(x), atol=1e-12, rtol=0)
    assert second[2].weight.requires_grad


def test_peft_layers_around_conv1d():
    model = peft.get_peft_model(
        build("gpt2"), peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    )
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_()
    y = loss_of(model.base_model.model, range(8))
    assert len(swap_(model).rows) == 3
    torch.testing.assert_close(loss_of(model.base_model.model, range(8)), y)


def test_it_compiles():
    conv, _ = twins()
    swap_(conv, r=3, seed=0)
    x = torch.randn(4, 12)
    compiled = torch.compile(conv, fullgraph=True)
    torch.testing.assert_close(compiled(x), conv(x))


def test_the_share_of_the_update_that_is_in_the_weights():
    model = build("gpt2")
    swap_(model, r=2, seed=0)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    for _ in range(4):
        loss_of(model, range(8)).backward()
        optimizer.step()
        optimizer.zero_grad()
    assert weight_update(model, build("gpt2"))["share"] == pytest.approx(1, abs=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [8, 512])
def test_gpu_transposed_weight_on_the_path_that_it_takes(randn, assert_close, tokens):
    def run(dtype, backend=None):
        x = randn_x.to("cuda", dtype).requires_grad_()
        a, b = (t.to("cuda", dtype).requires_grad_() for t in pair)
        y = lora_linear(x, stored.to("cuda", dtype).T, a, b, scaling=2.0, backend=backend)
        y.backward(randn_y.to("cuda", dtype))
        return [t.cpu() for t in (y, x.grad, a.grad, b.grad)]

    randn_x, randn_y = randn(tokens, 256), randn(tokens, 512)
    stored, pair = randn(256, 512, scale=0.02), (randn(8, 256, scale=0.05), randn(512, 8))
    truth = run(torch.float64, "reference")
    eager = run(torch.bfloat16, "reference")
    for found, e, t in zip(run(torch.bfloat16), eager, truth, strict=True):
        assert_close(found, e, t.double(), factor=3)
