"""Adapters of wrapped models: their files have the names of the plain model."""

import pytest
import torch
import torch.distributed as dist
from small_models import build
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from trained_adapters import base, output, trained
from version_1_adapters import save_version_1

from deltadiff import load_adapter, save_adapter, swap_, unswap_
from deltadiff.diffora import apply_, find_candidates, random_selection, selection_of
from deltadiff.errors import ArgumentError
from deltadiff.layers.adapter_files.format import read_adapter, read_adapter_config
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.layers.plain_names import plain_name


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("module.0.weight", "0.weight"),
        ("module._orig_mod.0.weight", "0.weight"),
        ("_orig_mod.module.module.0.weight", "0.weight"),
        ("_orig_mod.base_model.model.module.0", "0"),
        ("base_model.model.classifier.modules_to_save.default.weight", "classifier.weight"),
        ("layers.0._orig_mod.mlp._checkpoint_wrapped_module.up", "layers.0.mlp.up"),
        ("_fsdp_wrapped_module.layers.0._fsdp_wrapped_module.up", "layers.0.up"),
        ("model.layers.0.up", "model.layers.0.up"),
        ("base_model.layers.0", "base_model.layers.0"),
        ("encoder.module.0", "encoder.module.0"),
        ("module", ""),
    ],
)
def test_plain_name(name, plain):
    assert plain_name(name) == plain


@pytest.fixture(scope="module", autouse=True)
def one_process():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "none": lambda model: model,
    "DDP": DistributedDataParallel,
    "DataParallel": nn.DataParallel,
    "compile": compiled,
    "compile in DDP": lambda model: DistributedDataParallel(compiled(model)),
    "DDP in compile": lambda model: compiled(DistributedDataParallel(model)),
}


@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_a_wrapped_model_saves_what_the_plain_one_does(tmp_path, wrapper):
    model, _ = trained()
    save_adapter(model, tmp_path / "plain")
    save_adapter(WRAPPERS[wrapper](model), tmp_path / "wrapped")
    plain, wrapped = read_adapter(tmp_path / "plain"), read_adapter(tmp_path / "wrapped")
    assert plain[0] == wrapped[0] and set(plain[0]["layers"]) == {"0"}
    assert all(torch.equal(t, wrapped[1][name]) for name, t in plain[1].items())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("wrapper", WRAPPERS)
def test_an_adapter_goes_onto_a_wrapped_model(tmp_path, wrapper, swapped):
    model, _ = trained()
    save_adapter(model, tmp_path)
    fresh = base()
    if swapped:
        swap_(fresh, r=3, target_modules=["0"], modules_to_save=["2"])
    wrapped = WRAPPERS[wrapper](fresh)
    if "DDP" in wrapper and not swapped:
        with pytest.warns(UserWarning, match="call `swap_` or `load_adapter` first"):
            load_adapter(wrapped, tmp_path)
    else:
        load_adapter(wrapped, tmp_path)
    torch.testing.assert_close(output(wrapped), output(model), atol=1e-12, rtol=0)
    torch.testing.assert_close(output(fresh), output(model), atol=1e-12, rtol=0)
    unswap_(wrapped)
    assert not lora_layers(fresh) and all(p.requires_grad for p in fresh.parameters())


def test_pairs_that_ddp_did_not_see_are_said():
    with pytest.warns(UserWarning, match="does not average the gradients of pairs"):
        swap_(WRAPPERS["DDP"](base()), r=2, target_modules=["0"])


@pytest.mark.parametrize("wrapper", ["module.", "_orig_mod.", "module._orig_mod."])
def test_version_1_kept_the_names_of_wrappers(tmp_path, wrapper):
    model = base()
    apply_two = {"target_modules": ["0", "2"], "seed": 0}
    swap_(model, r=3, **apply_two)
    nn.init.normal_(model[0].lora_B)
    save_version_1(model, tmp_path, wrapper)
    assert set(read_adapter_config(tmp_path)["layers"]) == {"0", "2"}
    fresh = base()
    load_adapter(fresh, tmp_path)
    assert torch.equal(output(fresh), output(model))


@pytest.mark.parametrize("wrap_first", [False, True])
def test_the_selection_comes_from_inside_of_the_wrapper(tmp_path, wrap_first):
    model = build("bert")
    selection = random_selection(find_candidates(model), 0.5, seed=1)
    if wrap_first:
        wrapped = nn.DataParallel(model)
        apply_(wrapped, random_selection(find_candidates(wrapped), 0.5, seed=1))
    else:
        apply_(model, selection)
        wrapped = nn.DataParallel(model)
    assert selection_of(wrapped) is not None and selection_of(model) is not None
    save_adapter(wrapped, tmp_path)
    fresh = nn.DataParallel(build("bert"))
    load_adapter(fresh, tmp_path)
    assert selection_of(fresh) == selection_of(fresh.module) == selection


def test_names_that_only_a_wrapper_tells_apart_are_refused(tmp_path):
    model = nn.Module()
    model.module, model.first = nn.Sequential(), nn.Linear(4, 4)
    model.module.first = nn.Linear(4, 4)
    swap_(model, r=2)
    with pytest.raises(ArgumentError, match="two things that are called 'first'"):
        save_adapter(model, tmp_path / "adapter")
    assert not any(tmp_path.iterdir())
