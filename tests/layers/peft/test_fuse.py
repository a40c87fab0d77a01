"""`fuse_` changes the class of PEFT's layers and nothing else, and `unfuse_` changes it back."""

import copy
import io
import pickle

import peft
import pytest
import torch
from peft_cases import lora
from peft_checks import assert_equal_runs, facts_of, fused_calls, run, swap_quietly
from peft_models import input_of, make_model, output_of
from torch import nn
from torch.utils.checkpoint import checkpoint

from deltadiff import DeltaLoRA, swap_, swap_report, unswap_
from deltadiff.errors import SwapError

X = input_of("mlp")


def pair(kind="mlp", **options):
    plain, swapped = lora(kind, **options).build(), lora(kind, **options).build()
    swap_quietly(swapped)
    return plain, swapped


def compare(models, fused, call=None, x=X):
    """Equal runs of both models, of which the second has so many fused calls."""
    call = call or (lambda model: run(model, x, output_of))
    wanted = call(models[0])
    with fused_calls(models[1]) as calls:
        found = call(models[1])
    assert_equal_runs(wanted, found)
    assert calls.total() == fused


def test_unswap_gives_pefts_classes_back():
    plain, model = pair()
    kinds = [type(m) for m in plain.modules()]
    before, keys = facts_of(model), [sorted(vars(m)) for m in plain.modules()]
    run(model, X, output_of)
    model.zero_grad()
    unswap_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert [sorted(vars(m)) for m in model.modules()] == keys
    assert facts_of(model) == before
    compare((plain, model), 0)
    swap_(model)
    compare((plain, model), 2)


def test_swapping_twice_changes_nothing_but_the_backend():
    _, model = pair()
    layer = model.base_model.model.lin0
    deltas = layer.deltas
    swap_(model, backend="reference")
    assert layer.deltas is deltas and layer.backend == "reference"
    assert {row.path for row in swap_report(model).rows} == {"reference"}


# --------------------------------------------------------------------- copies of all kinds


def _through_torch_save(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


COPIES = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda model: pickle.loads(pickle.dumps(model)),
    "torch.save": _through_torch_save,
}


@pytest.mark.parametrize("trained", [None, "factored", "inplace"])
@pytest.mark.parametrize("name", COPIES)
def test_a_copy_is_fast_and_has_its_own_state(name, trained):
    _, model = pair()
    if trained:
        optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5, w_update=trained)
        for _ in range(3):
            output_of(model, X).square().mean().backward()
            optimizer.step()
    wanted = run(model, X, output_of)  # the layers know a fast way
    wanted = wanted[0], {n: g.clone() for n, g in wanted[1].items()}
    twin = COPIES[name](model)
    with fused_calls(twin) as calls:
        assert_equal_runs(wanted, run(twin, X, output_of))
    assert calls.total() == 2
    with torch.no_grad():
        for p in twin.parameters():
            p.zero_()
        for layer in twin.modules():
            for delta in getattr(layer, "deltas", {}).values():
                delta.anchor_A.zero_(), delta.anchor_B.zero_()
    assert not output_of(twin, X).any()
    assert_equal_runs(wanted, run(model, X, output_of))


def test_a_model_that_moves_stays_fast():
    plain, swapped = pair()
    output_of(swapped, X)
    for model in (plain, swapped):
        model.float().double()
    compare((plain, swapped), 2)
    swapped.to(torch.bfloat16)
    with fused_calls(swapped) as calls:
        assert output_of(swapped, X.bfloat16()).dtype == torch.bfloat16
    assert calls.total() == 2


# ------------------------------------------------------------------- in other people's hands


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(reentrant):
    def call(model):
        model.zero_grad()
        x = X.clone().requires_grad_()
        y = checkpoint(lambda x: output_of(model, x), x, use_reentrant=reentrant)
        y.square().sum().backward()
        grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
        return y.detach(), grads | {"x": x.grad}

    compare(pair(), 4, call)


@pytest.mark.parametrize("reentrant", [False, True])
def test_transformers_gradient_checkpointing(reentrant):
    models = pair("llama", task_type="CAUSAL_LM")
    for model in models:
        how = {"use_reentrant": reentrant}
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        model.enable_input_require_grads()
    compare(models, 12, x=input_of("llama"))


def test_generation():
    ids = input_of("llama")
    models = [m.eval() for m in pair("llama", task_type="CAUSAL_LM")]
    with fused_calls(models[1]) as calls:
        found = models[1].generate(input_ids=ids, max_new_tokens=4, do_sample=False)
    assert calls.total() == 6 * 4
    assert torch.equal(found, models[0].generate(input_ids=ids, max_new_tokens=4, do_sample=False))


def test_a_prepared_model_and_low_memory_loading(tmp_path):
    """Adapters that are on meta until they are loaded do not disturb `swap_`."""
    plain, _ = pair()
    plain.save_pretrained(tmp_path)
    base = plain.unload()
    again = peft.PeftModel.from_pretrained(base, str(tmp_path), low_cpu_mem_usage=True)
    swap_quietly(again)
    assert not any(p.is_meta for p in again.parameters())
    empty = peft.get_peft_model(base, again.peft_config["default"], low_cpu_mem_usage=True)
    report = swap_quietly(empty)
    assert {row.path for row in report.rows} == {"peft"}
    assert "its parameters are on several devices" in str(report)


def test_layers_that_peft_does_not_wrap_in_its_model():
    """``inject_adapter_in_model`` puts PEFT's layers into a model that stays the user's."""
    models = []
    for _ in range(2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 6)).double()
        config = peft.LoraConfig(r=2, target_modules=["0", "2"], init_lora_weights=False)
        models.append(peft.inject_adapter_in_model(config, model))
    swap_(models[1])
    compare(models, 2)
    with torch.no_grad():
        models[0][0].set_adapter([]), models[1][0].set_adapter([])
    compare(models, 1)


def test_adapters_of_transformers_without_pefts_model(tmp_path):
    x, models = input_of("llama"), []
    for _ in range(2):
        model = make_model("llama").double()
        options = {"r": 2, "target_modules": ["q_proj", "v_proj"], "init_lora_weights": False}
        torch.manual_seed(0)
        model.add_adapter(peft.LoraConfig(**options), "a")
        model.add_adapter(peft.LoraConfig(**options), "b")
        models.append(model)
    report = swap_(models[1])
    assert len(report.rows) == 6 and {row.path for row in report.rows} == {"reference"}
    models[1].save_pretrained(tmp_path)  # the active one, "b"
    calls = {
        "set": (lambda m: m.set_adapter("a"), 6),
        "two": (lambda m: m.set_adapter(["a", "b"]), 6),
        "disable": (lambda m: m.disable_adapters(), 0),
        "enable": (lambda m: m.enable_adapters(), 6),
        "load": (lambda m: m.load_adapter(str(tmp_path), "c"), 6),
        "hot-swap": (lambda m: m.load_adapter(str(tmp_path), "c", hotswap=True), 6),
        "delete": (lambda m: m.delete_adapter(["a", "b"]), 6),
    }
    for call, fused in calls.values():
        for model in models:
            call(model)
        compare(models, fused, x=x)


def test_a_swap_of_a_part_of_the_model():
    plain, model = lora("deep").build(), lora("deep").build()
    swap_(model.base_model.model.layers[1])
    compare((plain, model), 2)
    assert "4 of PEFT's layers run its own forward pass" in str(swap_report(model))


def test_unswap_refuses_a_pending_update_and_changes_nothing():
    _, model = pair()
    optimizer = DeltaLoRA(model, lr=1e-2, update_ratio=0.5)
    for _ in range(3):
        output_of(model, X).square().mean().backward()
        optimizer.step()
    wanted, kinds = run(model, X, output_of), [type(m) for m in model.modules()]
    with pytest.raises(SwapError, match="merge_and_unload.*export_peft"):
        unswap_(model)
    assert [type(m) for m in model.modules()] == kinds
    assert_equal_runs(wanted, run(model, X, output_of))
