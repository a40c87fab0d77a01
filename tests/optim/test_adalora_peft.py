"""AdaLoRA beside PEFT's implementation."""

import peft
import pytest
import torch
from adalora_runs import SCHEDULE, base, data, swapped, train

from deltadiff.errors import ArgumentTypeError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA, swap_adalora_


def peft_model(orth_reg_weight=0.0, dtype=torch.float64):
    config = peft.AdaLoraConfig(
        init_r=4, target_r=2, tinit=2, tfinal=3, deltaT=2, total_step=12, lora_alpha=8,
        target_modules=["0", "2", "4"], orth_reg_weight=orth_reg_weight,
    )  # fmt: skip
    return peft.get_peft_model(base(dtype), config).to(dtype)


def copy_from_peft(model, theirs):
    """The same P, Lambda, Q, and PEFT's scaling, alpha / (r + 1e-5)."""
    layers = theirs.base_model.model
    with torch.no_grad():
        for name, m in lora_layers(model).items():
            other = layers.get_submodule(name)
            m.lora_A.copy_(other.lora_A["default"])
            m.lora_B.copy_(other.lora_B["default"])
            m.gate.copy_(other.lora_E["default"].view(-1))
            m.scaling = 8 / (4 + 1e-5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_peft_step_by_step(dtype):
    """PEFT's layers, importance and allocation, called in the paper's order."""
    torch.manual_seed(3)
    theirs = peft_model(dtype=dtype)
    allocator = theirs.base_model.rankallocator
    model = swapped(dtype, lora_alpha=8)
    copy_from_peft(model, theirs)
    optimizer = AdaLoRA(model, lr=0.02, orth_reg_weight=0, **SCHEDULE)
    # peft 0.21.2 also leaves ranknum, the divisor, trainable; a change of it is no part of AdaLoRA.
    trained = [p for n, p in theirs.named_parameters() if ".lora_" in n]
    adamw = torch.optim.AdamW(trained, lr=0.02, weight_decay=0.01)
    tolerance = {"atol": 1e-11, "rtol": 1e-8} if dtype == torch.float64 else {"atol": 2e-4}
    tolerance.setdefault("rtol", 0)
    masked = 0
    for t in range(1, 10):
        x, y = data(t, dtype)
        torch.testing.assert_close(model(x), theirs.base_model.model(x), **tolerance)
        adamw.zero_grad()
        (theirs.base_model.model(x) - y).square().mean().backward()
        allocator.update_ipt(theirs.base_model.model)
        adamw.step()
        budget, masks = allocator.budget_schedule(t)
        assert budget == optimizer.budget(t)
        # At its last choice, T - t_f, PEFT forces a mask; see AdaLoraModel.update_and_allocate.
        if masks or t == 9:
            allocator.mask_to_budget(theirs.base_model.model, budget)
        train(model, optimizer, [t])
        for name, m in lora_layers(model).items():
            other = theirs.base_model.model.get_submodule(name).lora_E["default"].view(-1)
            assert torch.equal(m.gate == 0, other == 0)
            torch.testing.assert_close(m.gate, other, **tolerance)
            masked += int((m.gate == 0).sum())
    assert masked > 6


def test_pefts_regulariser_is_the_mean_of_norms():
    theirs = peft_model()
    model = swapped()
    copy_from_peft(model, theirs)
    norms = []
    for m in lora_layers(model).values():
        a, b = m.lora_A.detach(), m.lora_B.detach()
        norms += [(a @ a.T - torch.eye(4)).norm(), (b.T @ b - torch.eye(4)).norm()]
    optimizer = AdaLoRA(model, orth_reg_weight=1, **SCHEDULE)
    squares = torch.stack(norms).square().sum()
    torch.testing.assert_close(optimizer.orthogonality(), squares, atol=0, rtol=1e-7)


def test_models_of_peft_are_refused():
    wrapped = peft_model()
    with pytest.raises(ArgumentTypeError, match="PEFT"):
        swap_adalora_(wrapped)
    assert not lora_layers(wrapped)
