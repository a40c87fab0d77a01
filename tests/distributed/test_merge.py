"""`merge_` of sharded models: every process writes its rows, and the model stays sharded."""

import pytest
import torch
from fsdp_runs import METHODS, make_model, shard, train, values
from ranks import run_ranks, short_form
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.fsdp import fully_shard

from deltadiff import DeltaLoRA, merge_
from deltadiff.errors import SwapError
from deltadiff.layers.lora_linear import LoraLinear
from deltadiff.ranks import is_sharded


def outcome(model, report):
    ids = torch.arange(24).view(2, 12)
    with torch.no_grad():
        logits = model(input_ids=ids).logits
    errors = {(row.module, row.shape, row.dtype): row.error for row in report.rows}
    return values(model), logits.tolist(), errors


def merge_sharded(rank, method):
    """As it is after steps and after a forward pass, and of a model that no step trained."""
    dtype, how = METHODS[method]
    found = []
    for steps, options in ((3, {}), (3, {"reshard_after_forward": False}), (0, {})):
        model = shard(make_model(dtype), **options)
        train(model, DeltaLoRA(model, lr=5e-3, **how), rank, steps=steps)
        if steps:
            model(input_ids=torch.arange(8)[None])  # which leaves some parameters whole
        found.append(outcome(model, merge_(model)))
        assert not any(isinstance(m, LoraLinear) for m in model.modules())
        assert all(map(is_sharded, model.state_dict().values()))
        whole_state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True))
        assert [t.float().flatten().tolist() for t in whole_state.values()] == found[-1][0]
    return found


@pytest.mark.filterwarnings("ignore:.*rounding")
@pytest.mark.parametrize("method", short_form(METHODS, "remainder"))
def test_the_rows_of_all_processes_are_the_merged_weight(method):
    dtype, how = METHODS[method]
    expected = []
    for steps in (3, 3, 0):
        model = make_model(dtype)
        train(model, DeltaLoRA(model, lr=5e-3, **how), steps=steps)
        expected.append(outcome(model, merge_(model)))
    first, second = run_ranks(merge_sharded, method)
    assert first == second
    for (ours, logits, errors), (theirs, wanted, whole_errors) in zip(first, expected, strict=True):
        assert ours == theirs and logits == wanted
        assert errors == pytest.approx(whole_errors, rel=1e-6)


def unit_of_its_own(rank):
    model = make_model()
    for module in model.modules():
        if isinstance(module, LoraLinear):
            fully_shard(module)
    model = shard(model)
    before = values(model)
    with pytest.raises(SwapError, match="on which `fully_shard` was called itself"):
        merge_(model)
    return before == values(model) and any(isinstance(m, nn.Linear) for m in model.modules())


def test_a_layer_that_is_a_unit_is_refused():
    assert run_ranks(unit_of_its_own) == [True] * 2
