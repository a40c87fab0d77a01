"""The state of swapped layers: complete, equal to the base layer's own, and loaded back."""

import copy
import pickle

import pytest
import safetensors.torch
import torch
from quantised_layers import FixedLinear, Int8Linear, PackedLinear
from torch import nn

from deltadiff import swap_, unswap_
from deltadiff.layers.lora_layers import lora_layers

X = torch.randn(3, 8, generator=torch.Generator().manual_seed(1))


def eager(kind, seed=0):
    torch.manual_seed(seed)
    first = nn.Linear(8, 6)
    return nn.Sequential(first if kind is nn.Linear else kind(first), nn.Tanh(), nn.Linear(6, 4))


def swapped(kind, seed=0):
    model = eager(kind, seed)
    swap_(model, r=2, target_modules=["0"], seed=seed)
    nn.init.normal_(model[0].lora_B)
    return model


def clones(state):
    return {name: t.clone() for name, t in state.items()}


KINDS = [nn.Linear, Int8Linear, PackedLinear]


@pytest.mark.parametrize("kind", [*KINDS, FixedLinear])
def test_a_swapped_layer_saves_all_that_its_base_layer_saves(kind):
    model = swapped(kind)
    state, of_base = model.state_dict(), eager(kind).state_dict()
    assert set(state) == {*of_base, "0.lora_A", "0.lora_B"}
    assert all(torch.equal(state[name], t) for name, t in of_base.items())
    kept = model.state_dict(keep_vars=True)
    assert kept["0.weight"] is model[0].weight and kept["0.lora_A"] is model[0].lora_A


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("kind", KINDS)
def test_a_state_loads_into_another_swapped_model(kind, assign):
    model, other = swapped(kind), swapped(kind, seed=1)
    state = clones(model.state_dict())
    other.load_state_dict(state, assign=assign)
    assert torch.equal(other(X), model(X)) and type(other[0].weight) is type(model[0].weight)
    if not assign:
        for t in state.values():
            t.zero_()  # the model does not hold the tensors of the state
        assert torch.equal(other(X), model(X))
    unswap_(other)
    unswap_(model)
    assert torch.equal(other(X), model(X))


@pytest.mark.parametrize("kind", [*KINDS, FixedLinear])
def test_safetensors_and_copies(kind, tmp_path):
    model = swapped(kind)
    safetensors.torch.save_model(model, tmp_path / "model.safetensors")
    other = swapped(kind)
    nn.init.zeros_(other[0].lora_B)
    assert safetensors.torch.load_model(other, tmp_path / "model.safetensors") == (set(), [])
    copied = copy.deepcopy(model)
    assert all(torch.equal(m(X), model(X)) for m in (other, copied))
    assert torch.equal(copied.state_dict()["0.lora_B"], model[0].lora_B)


def test_scales_that_cannot_be_loaded_must_be_the_ones_that_are_there():
    model = swapped(FixedLinear)
    model.load_state_dict(clones(model.state_dict()))
    with pytest.raises(RuntimeError, match=r"0\.weight\.scale is another.*FixedLinear cannot load"):
        swapped(FixedLinear, seed=1).load_state_dict(model.state_dict(), strict=False)


@pytest.mark.parametrize("kind", [PackedLinear, FixedLinear])
def test_a_state_without_scales_is_for_the_same_weight_only(kind):
    """Earlier versions saved such states, beside a base model that never changed."""
    state = clones(swapped(kind).state_dict())
    del state["0.weight.scale"]
    swapped(kind).load_state_dict(state)
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.weight\.scale"'):
        swapped(kind, seed=1).load_state_dict(state)


def test_other_shapes_and_foreign_keys_are_reported_as_elsewhere():
    state = swapped(Int8Linear).state_dict()
    with pytest.raises(RuntimeError, match=r'Unexpected key.*"0\.zero_point"'):
        swapped(Int8Linear).load_state_dict({**state, "0.zero_point": torch.zeros(1)})
    with pytest.raises(RuntimeError, match="size mismatch for weight"):
        swapped(Int8Linear).load_state_dict({**state, "0.weight": state["0.weight"][:3]})
    found = swapped(Int8Linear).load_state_dict({}, strict=False)
    assert {"0.weight", "0.bias", "0.scale", "0.lora_A"} <= set(found.missing_keys)


# ------------------------------------------------------------------------------- gates


GATES = [torch.tensor([2.0, 0.0]), torch.tensor(0.5), torch.tensor([[1.0, 2.0], [0.0, 3.0]])]


@pytest.mark.parametrize("gate", GATES)
def test_a_gate_is_part_of_the_state(gate, tmp_path):
    model = swapped(nn.Linear)
    swap_(model, r=2, target_modules=["2"], seed=0)
    both = torch.stack([gate, gate])
    model[0].gate, model[2].gate = both.unbind()  # views of one tensor, as in a search
    safetensors.torch.save_file(model.state_dict(), tmp_path / "model.safetensors")
    state = safetensors.torch.load_file(tmp_path / "model.safetensors")
    plain, gated = (copy.deepcopy(model) for _ in range(2))
    for own, other in zip(lora_layers(plain).values(), lora_layers(gated).values(), strict=True):
        own.gate, other.gate = None, torch.ones_like(gate)
    held = gated[0].gate
    for other in (plain, gated):
        other.load_state_dict(state)
        assert torch.equal(other(X), model(X))
    assert gated[0].gate is held  # an optimizer may hold it too


def test_gates_that_do_not_fit():
    model, state = swapped(nn.Linear), swapped(nn.Linear).state_dict()
    with pytest.raises(RuntimeError, match=r"0\.gate has shape \(3,\), the layer has rank 2"):
        model.load_state_dict({**state, "0.gate": torch.ones(3)})
    with pytest.raises(RuntimeError, match=r"0\.gate has shape \(2, 3\), the layer has rank 2"):
        model.load_state_dict({**state, "0.gate": torch.ones(2, 3)})
    model[0].gate = torch.ones(2)
    with pytest.raises(RuntimeError, match=r"0\.gate has shape \(\), not \(2,\)"):
        model.load_state_dict({**state, "0.gate": torch.tensor(1.0)})
    with pytest.raises(RuntimeError, match=r'Missing key.*"0\.gate"'):
        model.load_state_dict(state)


# ------------------------------------------------------------------------ shared pairs


def sharing(seed=0, first=0):
    """Three layers; from the one numbered ``first`` on they share a pair."""
    torch.manual_seed(seed)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(3)))
    swap_(model, r=2, seed=seed)
    for layer in model:
        nn.init.normal_(layer.lora_B)
    for layer in model[first:]:
        layer.share_pair(model[first], "all")
    return model


def shares(model):
    return len({m.lora_A for m in model}) == len({m.lora_B for m in model}) == 1


def test_a_shared_pair_is_saved_once_and_loads_strictly():
    model, other = sharing(), sharing(seed=1)
    state = clones(model.state_dict())
    assert [name for name in state if "lora" in name] == ["0.lora_A", "0.lora_B"]
    other.load_state_dict(state)
    assert torch.equal(other(X), model(X)) and shares(other)
    with pytest.raises(RuntimeError, match=r'Missing key.*"1\.lora_A"'):
        sharing(first=1).load_state_dict(state)


def test_a_part_of_the_model_saves_the_pair_too():
    model = sharing()
    assert set(model[1:].state_dict()) == {
        "1.weight", "1.bias", "1.lora_A", "1.lora_B", "2.weight", "2.bias"
    }  # fmt: skip
    model[1:].load_state_dict(model[1:].state_dict())


def test_states_in_which_every_layer_has_its_copy():
    model, other = sharing(), sharing(seed=1)
    state = clones(model.state_dict())
    for i in (1, 2):
        state |= {f"{i}.lora_A": model[0].lora_A.detach(), f"{i}.lora_B": model[0].lora_B.detach()}
    other.load_state_dict(state)
    assert torch.equal(other(X), model(X)) and shares(other)
    state["2.lora_B"] = state["2.lora_B"] + 1
    with pytest.raises(RuntimeError, match=r"2\.lora_B is not the one that the group 'all' shares"):
        other.load_state_dict(state, strict=False)


def test_moves_and_copies_keep_the_sharing():
    model = sharing()
    moved = copy.deepcopy(model).to("meta").to_empty(device="cpu")
    assert shares(moved)
    moved.load_state_dict(model.state_dict())
    assigned = copy.deepcopy(model).to("meta")
    assigned.load_state_dict(clones(model.state_dict()), assign=True)
    copies = moved, assigned, copy.deepcopy(model), pickle.loads(pickle.dumps(model))
    for other in copies:
        assert shares(other) and torch.equal(other(X), model(X))
        assert not set(other.parameters()) & set(model.parameters())
