"""Layers with a trained Lambda: their start, their product, merging and adapter files."""

import hashlib
import json

import pytest
import torch
from adalora_runs import SCHEDULE, base, data, loss_of, swapped, train
from torch import nn

from deltadiff import DeltaLoRA, load_adapter, merge_, save_adapter, swap_, unswap_
from deltadiff.errors import ArgumentError, CheckpointError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_


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
    checksum = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
    path.write_text(json.dumps(config | {"checksum": checksum}))
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
    with pytest.raises(ArgumentError, match="0 with a gate"):
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
