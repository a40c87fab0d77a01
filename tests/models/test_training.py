"""Delta-LoRA on each family of the table: training, saving, loading and merging."""

from functools import cache

import pytest
import torch
from delta_lora_runs import W_UPDATES
from family_runs import outputs, pairs, swapped, targets, with_peft
from peft.tuners.lora import LoraLayer
from torch.testing import assert_close

from deltadiff import DeltaLoRA, LoraLinear, load_adapter, merge_, save_adapter, swap_

STEPS, RATIO = 3, 0.5
# eps is large, because AdamW blows up the roundings in gradients that are almost 0.
ADAMW = {"lr": 0.01, "eps": 1e-4, "weight_decay": 0.01}
ROUNDINGS = {"rtol": 1e-10, "atol": 1e-12}
AFTER_ADAMW = {"rtol": 1e-8, "atol": 1e-10}


def train(model, optimizer, inputs, after_step=lambda: None):
    model.train()
    for step in range(STEPS):
        optimizer.zero_grad()
        torch.manual_seed(step)
        model(**inputs).loss.backward()
        optimizer.step()
        after_step()


def trained_whole(model):
    """The names of the parameters that train beside the pairs."""
    names = (name for name, p in model.named_parameters() if p.requires_grad)
    return tuple(name for name in names if "lora_" not in name)


@cache
def by_algorithm_1(family, whole=()):
    """The outputs after Delta-LoRA with PEFT, torch.optim.AdamW and a loop over the layers.

    ``whole``: the names of parameters that train too.
    """
    model, inputs = with_peft(family), family.inputs()
    layers = [m for m in model.modules() if isinstance(m, LoraLayer)]
    products = []  # s B A of each layer, after each step

    @torch.no_grad()
    def update():
        products.append([layer.get_delta_weight("default") for layer in layers])
        if len(products) > 1:
            for layer, new, old in zip(layers, products[-1], products[-2], strict=True):
                layer.base_layer.weight += RATIO * (new - old)

    trained = [p for pair in pairs(model).values() for p in pair]
    trained += [model.base_model.model.model.get_parameter(n).requires_grad_() for n in whole]
    train(model, torch.optim.AdamW(trained, **ADAMW), inputs, update)
    return outputs(model, inputs)


@pytest.mark.parametrize("w_update", W_UPDATES)
def test_train_save_load_and_merge(family, w_update, tmp_path):
    inputs, model = family.inputs(), swapped(family)
    before = outputs(model, inputs)
    train(model, DeltaLoRA(model, update_ratio=RATIO, w_update=w_update, **ADAMW), inputs)
    trained = outputs(model, inputs)
    assert (trained - before).norm() > 1e-3 * before.norm()
    assert_close(trained, by_algorithm_1(family, trained_whole(model)), **AFTER_ADAMW)

    save_adapter(model, tmp_path)
    fresh = family.build()
    load_adapter(fresh, tmp_path)
    assert_close(outputs(fresh, inputs), trained, **ROUNDINGS)

    fresh = swapped(family)
    fresh.load_state_dict(model.state_dict(), strict=True)
    assert torch.equal(outputs(fresh, inputs), trained)

    merge_(model)
    assert_close(outputs(model, inputs), trained, **ROUNDINGS)


def test_a_merged_model_is_an_ordinary_model(family, tmp_path):
    inputs, model = family.inputs(), swapped(family)
    expected = outputs(model, inputs)
    report = merge_(model)
    assert [row.module for row in report.rows] == targets(family)
    assert not any(isinstance(m, LoraLinear) for m in model.modules())
    model.save_pretrained(tmp_path)
    again = family.load(tmp_path)
    assert type(again) is type(model)
    assert_close(outputs(again, inputs), expected, **ROUNDINGS)


def test_train_and_merge_pefts_model(family):
    inputs, model = family.inputs(), with_peft(family)
    swap_(model)
    train(model, DeltaLoRA(model, update_ratio=RATIO, **ADAMW), inputs)
    trained = outputs(model, inputs)
    assert_close(trained, by_algorithm_1(family), **AFTER_ADAMW)
    assert_close(outputs(model.merge_and_unload(), inputs), trained, **ROUNDINGS)
