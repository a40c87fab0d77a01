"""DeepSpeed's ZeRO: LoRA trains on its vectors; an update of W is refused, for it has no pairs."""

import pytest
import torch
from deepspeed_runs import flatten_groups, train_by_zero
from fsdp_runs import make_base, make_model, make_peft_model, train, values
from ranks import run_ranks, short_form

from deltadiff import (
    DeltaLoRA,
    FusedAdamW,
    export_peft,
    load_adapter,
    merge_,
    save_adapter,
    swap_,
    unswap_,
)
from deltadiff.errors import ArgumentError
from deltadiff.optim.dylora import DyLoRA

PAIRS_ARE_GONE = "flattened parameters, as of DeepSpeed's ZeRO.*under ZeRO .*update_ratio=0"


def test_vectors_in_the_place_of_parameters_are_trained():
    torch.manual_seed(0)
    parts = [torch.nn.Parameter(torch.randn(3, 4)), torch.nn.Parameter(torch.randn(5))]
    whole = FusedAdamW([torch.nn.Parameter(p.detach().clone()) for p in parts])
    flat = FusedAdamW(parts)
    flatten_groups(flat)
    for _ in range(3):
        for optimizer in (whole, flat):
            for p in optimizer.param_groups[0]["params"]:
                p.grad = p.detach().sin()
            optimizer.step()
    (vector,) = flat.param_groups[0]["params"]
    expected = torch.cat([p.flatten() for p in whole.param_groups[0]["params"]])
    assert vector.equal(expected) and not vector.equal(torch.cat([p.flatten() for p in parts]))


@pytest.mark.parametrize("make", [make_model, make_peft_model])
@pytest.mark.parametrize("w_update", ["inplace", "factored"])
def test_an_update_of_w_without_pairs_is_refused_before_anything_is_changed(make, w_update):
    model = make()
    optimizer = DeltaLoRA(model, w_update=w_update)
    flatten_groups(optimizer)
    (vector,) = optimizer.param_groups[0]["params"]
    vector.grad, before = torch.ones_like(vector), (vector.tolist(), values(model))
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ArgumentError, match=PAIRS_ARE_GONE):
            call()
    assert before == (vector.tolist(), values(model))


def partition(model):
    """Leave what ZeRO-3 leaves of parameters; ds_tensor, ds_shape and ds_status go with ds_id."""
    for i, p in enumerate(model.parameters()):
        p.data, p.ds_id = torch.empty(0), i
    return model


def test_parameters_that_are_partitioned_are_refused(tmp_path):
    base, model = partition(make_base(torch.float32)), make_model()
    save_adapter(model, tmp_path / "whole")
    partition(model)
    for call in (
        lambda: FusedAdamW(model), lambda: DeltaLoRA(model), lambda: swap_(base),
        lambda: load_adapter(base, tmp_path / "whole"), lambda: unswap_(model),
        lambda: save_adapter(model, tmp_path / "new"), lambda: merge_(model),
        lambda: export_peft(model, tmp_path / "new"),
    ):  # fmt: skip
        with pytest.raises(ArgumentError, match="ZeRO-3 has partitioned"):
            call()
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("peft", short_form([False, True]))
@pytest.mark.parametrize("stage", short_form([1, 2, 3]))
def test_lora_under_zero(stage, peft):
    pytest.importorskip("deepspeed")
    (first, resumed), other = run_ranks(train_by_zero, stage, "LoRA", peft)
    assert [first, resumed] == other == [first] * 2
    model = (make_peft_model if peft else make_model)()
    train(model, DeltaLoRA(model, lr=5e-3, update_ratio=0))
    for ours, theirs in zip(first, values(model), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", short_form(["in place", "factored"]))
@pytest.mark.parametrize("stage", short_form([1, 2, 3]))
def test_an_update_of_w_under_zero_is_refused(stage, method):
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match=PAIRS_ARE_GONE):
        run_ranks(train_by_zero, stage, method)


def test_dylora_has_no_ranks_there():
    model = make_model()
    optimizer = DyLoRA(model, r_min=1)
    flatten_groups(optimizer)
    before = values(model)
    with pytest.raises(ArgumentError, match=PAIRS_ARE_GONE):
        optimizer.step()
    assert before == values(model)
