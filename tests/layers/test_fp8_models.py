"""Whole models with weights in FP8: methods, adapters and files, and models of torchao."""

import pytest
import torch
from small_models import build, loss_of
from tolerance import relative_error
from torch import nn

from deltadiff import (
    DeltaLoRA,
    diffora,
    export_peft,
    load_adapter,
    merge_,
    quantise_,
    save_adapter,
    swap_,
    unswap_,
)  # fmt: skip
from deltadiff.errors import ArgumentTypeError
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_
from deltadiff.optim.dylora import DyLoRA

BF16 = torch.bfloat16
N, K = 150, 140


def test_files_of_adapters(tmp_path, randn):
    """An adapter that was trained over FP8 goes onto the model in full precision, and back."""
    model, ids = build("llama"), torch.randint(3, 40, (2, 8))
    quantise_(model, "fp8", granularity="row")
    swap_(model, r=2)
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")
    for _ in range(3):
        model(ids).logits.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    y = model(ids).logits
    save_adapter(model, tmp_path / "own")
    again = build("llama")
    quantise_(again, "fp8", granularity="row")
    load_adapter(again, tmp_path / "own")
    torch.testing.assert_close(again(ids).logits, y)
    dense = build("llama")
    load_adapter(dense, tmp_path / "own")
    assert relative_error(dense(ids).logits, y.double()) < 0.05
    peft = pytest.importorskip("peft")
    export_peft(model, tmp_path / "peft")
    base = build("llama")
    quantise_(base, "fp8", granularity="row")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "peft")
    torch.testing.assert_close(theirs(ids).logits, y, rtol=1e-4, atol=1e-5)


def search(model):
    state = diffora.Search(model, r=2, lora_alpha=4)
    data = diffora.split(16, share=0.5)
    call = lambda indices: loss_of(model, indices)  # noqa: E731
    gates = diffora.search(state, call, data, rounds=1, inner_steps=1, batch_size=4)
    state.close()
    diffora.apply_(model, gates.discretise(0.5), r=2, share_r=1)
    return DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update="factored")


def adalora(model):
    swap_adalora_(model, init_r=4)
    return AdaLoRA(model, lr=1e-2, total_step=10, target_r=2, tinit=1, tfinal=2)


def dylora(model):
    swap_(model, r=4)
    return DyLoRA(model, lr=1e-2, r_min=1)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "method",
    [search, *(pytest.param(f, marks=pytest.mark.long) for f in (adalora, dylora))],
)
def test_the_other_methods_train_over_FP8(method):
    model = build("llama").train()
    quantise_(model, "fp8")
    before = {n: t.clone() for n, t in model.state_dict().items()}
    optimizer = method(model)
    losses = []
    for _ in range(6):
        losses.append(loss_of(model, range(8)))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < losses[0]
    after = model.state_dict()
    assert all(torch.equal(after[n].float(), t.float()) for n, t in before.items())


def of_torchao():
    pytest.importorskip("torchao")
    from torchao.quantization import Float8WeightOnlyConfig, quantize_

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(K, N, dtype=BF16), nn.Linear(N, K, dtype=BF16))
    quantize_(model, Float8WeightOnlyConfig())
    return model


def test_weights_of_torchao(randn):
    model, x = of_torchao(), randn(4, K, dtype=BF16)
    y = model(x)
    report = swap_(model, r=2)
    assert {row.path for row in report.rows} == {"cpp"}
    assert relative_error(model(x), y.double()) < 0.01
    with pytest.raises(ArgumentTypeError, match="quantised"):
        merge_(model)


def test_layers_of_peft_on_torchao(randn):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=2, target_modules=["0", "1"], init_lora_weights=False)
    model, x = peft.get_peft_model(of_torchao(), config), randn(4, K, dtype=BF16)
    y = model(x)
    report = swap_(model)
    assert {row.path for row in report.rows} == {"cpp"}
    assert relative_error(model(x), y.double()) < 0.01
    unswap_(model)
    assert torch.equal(model(x), y)
