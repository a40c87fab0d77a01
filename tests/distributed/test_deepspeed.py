"""DeepSpeed's ZeRO: AdamW trains its vectors, and a factored update of W follows the pairs."""

import copy

import pytest
import torch
from deepspeed_runs import (
    Flattened,
    flatten_groups,
    load_elastic,
    load_universal,
    save_universal,
    train_by_accelerate,
    train_by_zero,
    trained_values,
)
from fsdp_runs import METHODS, make_base, make_model, make_peft_model, parts_of, train, values
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
from deltadiff.errors import ArgumentError, SwapError
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.dylora import DyLoRA

PAIRS_ARE_GONE = "flattened parameters, as of DeepSpeed's ZeRO.*under ZeRO .*update_ratio=0"
RATIOS = [0.5, 0.5, 0.5, 0.5, 0.25, 0.0, 0.5]


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


def train_on(model, optimizer, steps, ratios=RATIOS):
    """Some steps, each with a lambda of its own; ``optimizer`` may be `Flattened`."""
    own = getattr(optimizer, "optimizer", optimizer)
    for t in steps:
        own.param_groups[0]["update_ratio"] = ratios[t]
        (ids,) = parts_of(t, 1)
        model(input_ids=ids, labels=ids).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


def loaded(optimizer, vector, saved, universal):
    if universal:
        optimizer.load_universal(vector, saved)
    else:
        optimizer.optimizer.load_state_dict(saved)
        optimizer.optimizer.param_groups[0]["params"][0].data.copy_(vector)
        optimizer.put_back()


@pytest.mark.parametrize("start_step", [0, 2])
@pytest.mark.parametrize("make", [make_model, make_peft_model])
def test_a_factored_update_follows_its_vector(make, start_step):
    """The same bits as without vectors, under a lambda that changes; also from a state."""
    how = {"lr": 5e-3, "w_update": "factored", "start_step": start_step}
    one, flat = make(), make()
    train_on(one, DeltaLoRA(one, **how), range(7))
    vector = Flattened(DeltaLoRA(flat, **how))
    train_on(flat, vector, range(5))
    saved, (ids,) = copy.deepcopy(vector.optimizer.state_dict()), parts_of(9, 1)
    values, answer = vector.values.clone(), flat(input_ids=ids).logits
    trained = [(flat, vector)]
    for universal, used in ((False, False), (True, False), (True, True)):
        other = make()
        optimizer = Flattened(DeltaLoRA(other, **how))
        train_on(other, optimizer, range(4) if used else ())
        loaded(optimizer, values, copy.deepcopy(saved), universal)
        assert other(input_ids=ids).logits.equal(answer)
        trained.append((other, optimizer))
    for model, optimizer in trained:
        train_on(model, optimizer, range(5, 7))
        assert trained_values(model) == trained_values(one)
    without = make()
    train_on(without, DeltaLoRA(without, **how), range(7), [0.0] * 7)
    assert trained_values(without) != trained_values(one)


def test_other_moments_in_the_place_of_those_of_a_vector_are_taken():
    """Those of torch's AdamW, whose state says nothing of deltadiff."""
    torch.manual_seed(0)
    start, grad = torch.randn(2, 12).unbind()
    found = []
    for kind, used in ((torch.optim.AdamW, 0), (FusedAdamW, 0), (FusedAdamW, 2)):
        vectors = [torch.nn.Parameter(start.clone()) for _ in range(2)]
        theirs, ours = torch.optim.AdamW(vectors[:1]), kind(vectors[1:])
        vectors[1].grad = grad.sin()
        for _ in range(used):
            ours.step()
        vectors[0].grad = grad
        for _ in range(3):
            theirs.step()
        ours.state[vectors[1]] = copy.deepcopy(theirs.state[vectors[0]])
        vectors[1].data.copy_(vectors[0])
        ours.step()
        found.append(vectors[1].detach())
    for vector in found[1:]:
        torch.testing.assert_close(vector, found[0], rtol=1e-6, atol=0)


def test_w_stays_while_others_write_the_pair_between_steps():
    model = make_model()
    optimizer = Flattened(DeltaLoRA(model, lr=5e-3, w_update="factored"))
    train_on(model, optimizer, range(3))
    (ids,) = parts_of(9, 1)
    with torch.inference_mode():  # the first look at the model after the step
        before = model(input_ids=ids).logits.clone()
    layer = next(iter(lora_layers(model).values()))
    x, kept = torch.randn(3, layer.in_features), layer.lora_B.detach().clone()
    with torch.no_grad():
        both = layer(x)
        layer.lora_B.zero_()
        added = layer(x) - x @ layer.weight.T
        a, b, past = layer.lora_A, kept, layer.delta
        expected = 0.5 * layer.scaling * (x @ a.T @ b.T - x @ past.anchor_A.T @ past.anchor_B.T)
        assert expected.abs().max() > 1e-4
        torch.testing.assert_close(added, expected, rtol=1e-3, atol=1e-6)
        layer.lora_B.copy_(kept)
        assert layer(x).equal(both) and model(input_ids=ids).logits.equal(before)


def refusal(model, optimizer, error, match, calls=("step", "state_dict")):
    vectors = [p for group in optimizer.param_groups for p in group["params"]]
    for vector in vectors:
        vector.grad = torch.ones_like(vector)
    before = [vector.tolist() for vector in vectors], values(model)
    for call in calls:
        with pytest.raises(error, match=match):
            getattr(optimizer, call)()
    assert before == ([vector.tolist() for vector in vectors], values(model))


def test_an_update_in_place_is_refused_before_anything_is_changed():
    model = make_model()
    optimizer = DeltaLoRA(model)
    flatten_groups(optimizer)
    refusal(model, optimizer, ArgumentError, "w_update.*ZeRO, whose step leaves.*'factored'")


def test_vectors_that_were_never_parameters_have_no_pairs():
    model = make_model()
    vector = torch.cat([p.detach().flatten() for p in model.parameters() if p.requires_grad])
    with pytest.raises(ArgumentError, match=PAIRS_ARE_GONE):
        DeltaLoRA([vector.requires_grad_()], model=model, w_update="factored")


@pytest.mark.parametrize("kind", [FusedAdamW, DeltaLoRA])
def test_several_groups_are_refused(kind):
    """ZeRO steps with one after the other, and the moments of the others would be lost."""
    model = make_model()
    how = {} if kind is FusedAdamW else {"w_update": "factored"}
    optimizer = kind([{"params": layer} for layer in model.model.layers], **how)
    flatten_groups(optimizer)
    del optimizer.param_groups[1:]
    refusal(model, optimizer, ArgumentError, "param_groups.*2 groups.*ZeRO.*one group", ["step"])


def test_vectors_one_after_the_other_are_refused():
    optimizer = FusedAdamW([torch.nn.Parameter(torch.ones(4))])
    for refused in (False, True):
        vector = torch.ones(2, requires_grad=True)
        vector.grad = torch.ones(2)
        optimizer.param_groups[0]["params"] = [vector]
        if refused:
            with pytest.raises(SwapError, match="all that it trained.*sub_group_size"):
                optimizer.step()
        else:
            optimizer.step()
        assert vector.equal(torch.ones(2)) == refused


def test_skipping_by_what_one_process_sees_is_refused():
    model = make_model()
    optimizer = DeltaLoRA(model, w_update="factored", skip_nonfinite=True)
    flatten_groups(optimizer)
    refusal(model, optimizer, ArgumentError, "skip_nonfinite.*ZeRO.*check_grad_overflow")


def test_a_vector_on_another_device_is_refused():
    model = make_model()
    optimizer = DeltaLoRA(model, w_update="factored")
    flatten_groups(optimizer)
    group = optimizer.param_groups[0]
    group["params"] = [torch.empty_like(group["params"][0], device="meta").requires_grad_()]
    for call in (optimizer.step, optimizer.state_dict):
        with pytest.raises(ArgumentError, match="DeepSpeed trains on meta.*offload_optimizer"):
            call()


NO_UPDATE = {"A.anchor": "no anchor of", "B.update": "no update of", "": "no update of"}


@pytest.mark.parametrize("lost", NO_UPDATE)
def test_a_state_that_lacks_a_part_of_a_layer_is_refused(lost):
    """Of the first layer; "" means all of it."""
    refused_state(lambda state: [state.pop(k) for k in first_keys(state, lost)], NO_UPDATE[lost])


@pytest.mark.parametrize("change", [lambda t: t[1:], lambda t: None])
def test_a_state_whose_anchors_do_not_fit_is_refused(change):
    def put(state):
        (key,) = first_keys(state, "A.anchor")
        state[key] = change(state[key])

    refused_state(put, "anchor of .*lora_A in state_dict")


def first_keys(state, end):
    return [key for key in state if "layers.0" in key and "q_proj" in key and key.endswith(end)]


def refused_state(change, words):
    """Before anything is changed, by `load_state_dict` and as from a universal checkpoint."""
    model = make_model()
    optimizer = Flattened(DeltaLoRA(model, lr=5e-3, w_update="factored"))
    train_on(model, optimizer, range(3))
    saved = copy.deepcopy(optimizer.optimizer.state_dict())
    change(saved["param_groups"][0]["deltadiff.updates"])
    fresh = make_model()
    other = Flattened(DeltaLoRA(fresh, w_update="factored"))
    for one, held in ((model, optimizer), (fresh, other)):
        before = trained_values(one)
        with pytest.raises(ArgumentError, match=words):
            held.optimizer.load_state_dict(saved)
        assert trained_values(one) == before
        vector, groups = held.values, copy.deepcopy(saved)
        with pytest.raises(ArgumentError, match=words):
            held.load_universal(vector, groups)
        for call in (held.optimizer.state_dict, held.optimizer.step):
            with pytest.raises(ArgumentError, match=words):
                call()
        assert trained_values(one) == before


@pytest.mark.parametrize("change", [
    lambda updates: updates.update(more=torch.ones(1)),
    lambda updates: updates.update({k.replace("q_proj", "x"): t for k, t in updates.items()}),
])  # fmt: skip
def test_a_state_of_other_layers_is_refused(change):
    refused_state(change, "got updates of .* accepted: those of this model's layers")


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
@pytest.mark.parametrize("method", short_form(["LoRA", "factored", "factored, K = 2"]))
@pytest.mark.parametrize("stage", short_form([1, 2, 3]))
def test_training_under_zero(stage, method, peft):
    pytest.importorskip("deepspeed")
    found, other = run_ranks(train_by_zero, stage, method, peft)
    assert found == other == found[:1] * 3
    dtype, how = METHODS[method]
    model = (make_peft_model if peft else make_model)(dtype)
    train(model, DeltaLoRA(model, lr=5e-3, **how))
    for ours, theirs in zip(found[0], trained_values(model), strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=3e-6)


@pytest.mark.parametrize("method", short_form(["LoRA", "factored"], "factored"))
@pytest.mark.parametrize("stage", short_form([1, 2, 3], 2))
def test_training_under_zero_by_accelerate(stage, method):
    pytest.importorskip("deepspeed")
    first, second = run_ranks(train_by_accelerate, stage, method)
    dtype, how = METHODS[method]
    model = make_model(dtype)
    train(model, DeltaLoRA(model, lr=5e-3, **how))
    assert first == second
    if stage < 3:  # which sums in another order
        assert first == values(model)
    for found, expected in zip(first, values(model), strict=True):
        torch.testing.assert_close(torch.tensor(found), torch.tensor(expected), rtol=0, atol=5e-6)


@pytest.mark.parametrize("peft", short_form([False, True]))
@pytest.mark.parametrize("method", short_form(["LoRA", "factored", "factored, K = 2"]))
@pytest.mark.parametrize("stage", short_form([1, 2, 3]))
def test_a_universal_checkpoint_under_zero(stage, method, peft, tmp_path):
    """In as many processes as saved it and in one, in a new engine and in one that has trained."""
    pytest.importorskip("deepspeed")
    run = str(tmp_path), stage, method, peft
    saved = run_ranks(save_universal, *run)
    assert run_ranks(load_universal, *run) == run_ranks(load_universal, *run, True) == saved
    (found,) = run_ranks(load_universal, *run, size=1)
    assert found[0] == saved[0][0]
    for ours, theirs in zip(found[1], saved[0][1], strict=True):
        torch.testing.assert_close(torch.tensor(ours), torch.tensor(theirs), rtol=0, atol=3e-6)


@pytest.mark.parametrize("stage", short_form([1, 2]))
def test_an_elastic_checkpoint_under_zero_is_refused(stage):
    """By DeepSpeed, which misses a "step" in the param groups, before it changes the optimizer."""
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match="BASE_OPTIMIZER_STATE_STEP"):
        run_ranks(load_elastic, stage)


@pytest.mark.parametrize("stage", short_form([1, 2, 3]))
def test_an_update_in_place_under_zero_is_refused(stage):
    pytest.importorskip("deepspeed")
    with pytest.raises(AssertionError, match="ZeRO, whose step leaves.*'factored'"):
        run_ranks(train_by_zero, stage, "in place")


def test_dylora_has_no_ranks_there():
    model = make_model()
    optimizer = DyLoRA(model, r_min=1)
    flatten_groups(optimizer)
    before = values(model)
    with pytest.raises(ArgumentError, match=PAIRS_ARE_GONE):
        optimizer.step()
    assert before == values(model)
