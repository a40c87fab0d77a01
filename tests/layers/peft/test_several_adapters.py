"""Several adapters on one model: together, in turn, from files, exchanged, combined, routed."""

import copy
from unittest import mock

import peft
import pytest
import torch
from peft.tuners.lora import ArrowConfig, create_arrow_model
from peft.utils.hotswap import hotswap_adapter, prepare_model_for_compiled_hotswap
from peft_cases import shake
from peft_checks import assert_equal_runs, facts_of, files_of, fused_calls, run, swap_quietly
from peft_models import input_of, make_model, output_of

pytestmark = pytest.mark.filterwarnings("ignore")  # PEFT's own, about these calls
MODEL, X = "mlp", input_of("mlp")


def config(**options) -> peft.LoraConfig:
    options = {"r": 2, "lora_alpha": 6, "target_modules": ["lin0", "lin1"], **options}
    return peft.LoraConfig(**options)


def build(*configs, dtype=torch.float64):
    """A model with an adapter "a", "b", ... for each configuration, the first of them active."""
    model = peft.get_peft_model(make_model(MODEL), configs[0], adapter_name="a")
    for name, each in zip("bcd", configs[1:], strict=False):
        model.add_adapter(name, each)
    return shake(model.to(dtype))


def pair(*configs, active=None, change=None):
    """The model as PEFT runs it and swapped, with these adapters active."""
    models = build(*configs), build(*configs)
    for model in models:
        if change is not None:
            change(model)
        model.base_model.set_adapter(list(active or "abcd"[: len(configs)]))
    swap_quietly(models[1])
    return models


def compare(models, fused, x=X):
    with fused_calls(models[1]) as calls:
        found = run(models[1], x, output_of)
    assert_equal_runs(run(models[0], x, output_of), found)
    assert calls.total() == fused and set(calls.values()) <= {1}


# --------------------------------------------------------------------- several are active


TOGETHER = {
    "the same layers": ([config(), config()], "ab", 2),
    "other layers": ([config(target_modules=["lin0"]), config(target_modules=["lin1"])], "ab", 2),
    "one layer in common": ([config(), config(target_modules=["lin1"])], "ab", 2),
    "other ranks and scales": ([config(r=1), config(r=5, lora_alpha=1)], "ab", 2),
    "another scale by rank": ([config(), config(use_rslora=True)], "ab", 2),
    "three": ([config(), config(r=1), config(r=4)], "abc", 2),
    "two of three": ([config(), config(r=1), config(r=4)], "ac", 2),
    "in another order": ([config(), config()], "ba", 2),
    "twice the same": ([config(), config()], "aa", 2),
    "of which one is not on a layer": ([config(), config(target_modules=["lin1"])], "b", 1),
    "a variant beside": ([config(), config(use_dora=True)], "ab", 0),
    "a variant on one layer": ([config(), config(use_dora=True, target_modules=["lin1"])], "ab", 1),
    "a bias beside": ([config(), config(lora_bias=True)], "ab", 0),
    "dropout": ([config(lora_dropout=0.5), config()], "ab", 0),
    "dropout that is not active": ([config(lora_dropout=0.5), config()], "b", 2),
}


@pytest.mark.parametrize("name", TOGETHER)
def test_several_active_adapters_are_one_call(name):
    configs, active, fused = TOGETHER[name]
    compare(pair(*configs, active=active), fused)


def test_dropout_of_several_is_fast_in_evaluation():
    models = pair(config(lora_dropout=0.5), config(), active="ab")
    for model in models:
        model.eval()
    compare(models, 2)


def test_scales_that_are_tensors_are_fast():
    models = pair(config(), config(r=4), change=prepare_model_for_compiled_hotswap)
    compare(models, 2)
    for model in models:
        model.base_model.set_adapter(["a"])
    compare(models, 2)


@pytest.mark.parametrize("which", ["one", "both"])
def test_adapters_of_another_dtype_than_the_base_run_pefts_forward(which):
    def change(model):
        for module in model.modules():
            if isinstance(module, peft.tuners.lora.LoraLayer):
                for name in "b" if which == "one" else "ab":
                    module.lora_A[name].float(), module.lora_B[name].float()

    models = pair(config(), config(), change=change)
    wanted, found = (output_of(m, X) for m in models)
    assert torch.equal(wanted, found)
    compare(pair(config(), config(), change=change, active="a"), 2 if which == "one" else 0)


# -------------------------------------------------------------- in turn, and from files


def test_calls_that_change_the_adapters(tmp_path):
    """After each call: equal runs, equal files, equal words of PEFT about the model."""
    models = pair(config(), config(r=1, modules_to_save=["norm"]), active="a")
    calls = {
        "set": lambda m: m.set_adapter("b"),
        "add": lambda m: (m.add_adapter("c", config(r=3)), m.set_adapter("c")),
        "delete": lambda m: (m.set_adapter("a"), m.delete_adapter("c")),
        "disable": lambda m: m.base_model.disable_adapter_layers(),
        "enable": lambda m: m.base_model.enable_adapter_layers(),
        "save": lambda m: m.save_pretrained(tmp_path / m.kind),
        "load": lambda m: (m.load_adapter(tmp_path / m.kind / "b", "d"), m.set_adapter("d")),
        "load again": lambda m: m.load_adapter(tmp_path / m.kind / "b", "d"),
        "merge": lambda m: m.merge_adapter(["a"]),
        "unmerge": lambda m: m.unmerge_adapter(),
    }
    models[0].kind, models[1].kind = "plain", "swapped"
    for name, call in calls.items():
        for model in models:
            torch.manual_seed(0)
            call(model)
        swap_quietly(models[1])
        compare(models, {"disable": 0, "merge": 0}.get(name, 2))
        assert models[0].get_model_status() == models[1].get_model_status(), name
        assert models[0].get_layer_status() == models[1].get_layer_status(), name
    states = [{k: peft.get_peft_model_state_dict(m, adapter_name=k) for k in "ab"} for m in models]
    for each in "ab":
        assert all(torch.equal(t, states[1][each][n]) for n, t in states[0][each].items())
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "swapped")


def test_disable_adapter_gives_the_base():
    models = pair(config())
    with models[0].disable_adapter(), models[1].disable_adapter():
        compare(models, 0)
        found = output_of(models[1], X)
    compare(models, 2)
    assert torch.equal(found, output_of(models[0].unload(), X))


def test_from_pretrained_then_swap(tmp_path):
    models = pair(config())
    models[1].save_pretrained(tmp_path)
    base = models[0].unload()
    load = peft.PeftModel.from_pretrained
    models = [load(copy.deepcopy(base), str(tmp_path / "a"), is_trainable=True) for _ in range(2)]
    before = facts_of(models[1])
    swap_quietly(models[1])
    assert facts_of(models[1]) == before
    compare(models, 2)


# ------------------------------------------------------------------------ hot-swapping


@pytest.mark.parametrize("prepared", [False, True])
def test_hot_swapping(prepared, tmp_path):
    build(config(r=4, lora_alpha=2)).save_pretrained(tmp_path)
    models = pair(config())
    if prepared:
        for model in models:
            prepare_model_for_compiled_hotswap(model, target_rank=5)
    compare(models, 2)
    for model in models:
        hotswap_adapter(model, tmp_path / "a", adapter_name="a", torch_device="cpu")
    compare(models, 2)
    scaling = models[1].base_model.model.lin0.scaling["a"]
    assert float(scaling) == 0.5 and isinstance(scaling, torch.Tensor) == prepared


# ------------------------------------------------------------------------ combined, routed

KINDS = [
    "svd", "linear", "cat", "ties", "ties_svd", "dare_ties", "dare_linear", "dare_ties_svd",
    "dare_linear_svd", "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_weighted_adapters(kind):
    models = pair(config(), config(), active="a")
    for model in models:
        torch.manual_seed(0)
        density = None if kind in ("svd", "linear", "cat") else 0.5
        model.add_weighted_adapter("ab", [0.7, -0.4], "sum", kind, density=density)
        model.set_adapter("sum")
    compare(models, 2)


def test_arrow(tmp_path):
    """Arrow routes each token to some of the adapters, by PEFT's own forward pass."""
    options = {"r": 2, "target_modules": ["q_proj"], "task_type": "CAUSAL_LM"}
    for name in "ab":
        model = peft.get_peft_model(make_model("llama"), peft.LoraConfig(**options))
        shake(model, ord(name)).save_pretrained(tmp_path / name)

    def make():
        paths, arrow = [str(tmp_path / name) for name in "ab"], ArrowConfig(top_k=1)
        return create_arrow_model(make_model("llama"), paths, arrow).double()

    models, x = (make(), make()), input_of("llama")
    report = swap_quietly(models[1])
    compare(models, 0, x)
    assert "a variant of LoRA: ArrowLinearVariant" in str(report)


def test_a_model_card_is_written_as_pefts(tmp_path):
    """PEFT's README of a saved adapter names the base's class, not ours."""
    models = pair(config())
    for model, name in zip(models, ("plain", "swapped"), strict=True):
        with mock.patch("huggingface_hub.ModelCard.validate"):
            model.save_pretrained(tmp_path / name)
    assert "README.md" in files_of(tmp_path / "plain")
    assert files_of(tmp_path / "plain") == files_of(tmp_path / "swapped")
