"""Training beside weights of 4 bits, by bitsandbytes, which also runs on a CPU."""

import json
import sys

import pytest
import torch
from finetune_runs import (
    finetune,
    prepare,
    runner_of,
    stop_at,
    train,
    train_method,
    trained_names,
)

from deltadiff.__main__ import main
from deltadiff.finetune import training
from deltadiff.finetune.methods.table import METHODS
from deltadiff.finetune.training_setup import FirstStage
from deltadiff.layers.lora_layers import lora_layers

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

FACTORED = {"w_update": "factored"}
METHODS_WITH = {
    "lora": {}, "lora-alpha-control": {}, "lora-peft": {}, "adalora": {}, "dylora": {}, "flora": {},
    "delta-lora": FACTORED, "delta-lora-factored": {}, "diffora-random": {},
    "diffora": {}, "diffora-no-sharing": {}, "diffora-delta-lora": FACTORED,
}  # fmt: skip


@pytest.fixture(scope="module")
def bnb():
    return pytest.importorskip("bitsandbytes")


def test_every_method_that_leaves_an_adapter_is_tried():
    adapters = {name for name, method in METHODS.items() if method.adapter_formats}
    assert adapters - {"delta-lora-nearest"} == set(METHODS_WITH)  # which is in place


@pytest.mark.parametrize("method", METHODS_WITH)
def test_adapters_are_trained_and_the_weights_stay(method, bnb, bert, reviews, tmp_path, capsys):
    if method == "lora-peft":
        pytest.importorskip("peft")
    more = {"search_rounds": 1, "inner_steps": 1, "start_step": 0, "batch_size": 4}
    more |= METHODS_WITH[method] | {"load_in_4bit": True}
    inputs, setup = prepare(method, bert, reviews, **more)
    setup = setup.run(tmp_path) if isinstance(setup, FirstStage) else setup
    before = {name: p.clone() for name, p in setup.module.named_parameters()}
    runner, scaler = runner_of(inputs, setup), torch.amp.GradScaler("cpu", enabled=False)
    for _ in range(3):
        training._backward(runner, setup, scaler, inputs.train, list(range(4)), 4)
        setup.optimizer.step()
        setup.optimizer.zero_grad()
    same = {n for n, p in setup.module.named_parameters() if torch.equal(p, before[n])}
    trained = trained_names(setup.module)
    assert same >= before.keys() - trained and len(trained - same) > 10
    assert sum(before[name].dtype == torch.uint8 for name in same) >= 12


def test_a_run_learns(bnb, bert, reviews, tmp_path):
    words = ["--load-in-4bit", "--steps", "40", "--start-step", "3"]
    result = train_method(tmp_path / "out", "delta-lora-factored", bert, reviews, *words)
    assert result["after"]["loss"] < 0.95 * result["before"]["loss"]
    assert result["similarity"] and result["weight_update"] is None
    for blocks in result["similarity"].values():
        assert all(0.1 < cosine < 1 + 1e-6 for cosine in blocks.values())
    adapter, merged = str(tmp_path / "out" / "adapter"), tmp_path / "merged"
    assert main(["merge", bert, adapter, str(merged)]) == 0  # the base as it is on the disk
    kind = transformers.AutoModelForSequenceClassification
    assert kind.from_pretrained(merged).config.id2label == {0: "dull", 1: "fun"}


@pytest.mark.parametrize(
    ("name", "label"), [("bert", "label"), ("llama", None), ("llama", "label")]
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_has_4_bits_and_what_is_trained(name, label, dtype, bnb, request, reviews):
    inputs, setup = prepare(
        "lora", request.getfixturevalue(name), reviews, load_in_4bit=True, label_column=label,
        dtype=dtype,
    )  # fmt: skip
    module = setup.module
    layers = lora_layers(module)
    assert len(layers) == {"bert": 13, "llama": 14}[name]
    for layer in layers.values():
        if layer.weight.dtype != torch.uint8:
            continue
        assert layer.weight.quant_state.quant_type == "nf4" and layer.weight.quant_state.nested
        assert layer.weight.quant_state.dtype == getattr(torch, dtype)
    whole = {name for name, layer in layers.items() if layer.weight.dtype != torch.uint8}
    assert whole == set() or whole == {"bert.pooler.dense"}
    trained = [p for p in module.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}
    heads = {n for n in trained_names(module) if "lora_" not in n}
    assert heads == {f"{head}.{part}" for head in inputs.model.head for part in parts(module, head)}
    outputs = module.get_output_embeddings()
    assert label or (type(outputs) is torch.nn.Linear and outputs.weight.is_floating_point())


def parts(module, head: str) -> list[str]:
    return [name for name, _ in module.get_submodule(head).named_parameters()]


@pytest.mark.gpu
def test_a_run_learns_on_a_gpu(bnb, llama, reviews, tmp_path):
    words = ["--method", "delta-lora-factored", "--load-in-4bit", "--dtype", "bfloat16"]
    words += ["--gradient-checkpointing", "--device", "cuda"]
    result = train(llama, reviews, tmp_path / "out", *words, labels=False)
    assert result["after"]["nll_per_token"] < 0.9 * result["before"]["nll_per_token"]


def test_a_run_is_resumed(bnb, llama, reviews, tmp_path, monkeypatch):
    words = ["--method", "delta-lora-factored", "--load-in-4bit", "--dtype", "bfloat16"]
    words += ["--steps", "5", "--start-step", "1", "--gradient-checkpointing"]
    words += ["--gradient-accumulation", "2", "--batch-size", "2", "--eval-batch-size", "40"]
    whole = train(llama, reviews, tmp_path / "whole", *words, labels=False)
    fixed = ["--lr", "0.01", "--device", "cpu", "--output", tmp_path / "out"]
    with monkeypatch.context() as patch:
        stop_at(patch, training, 4)
        assert finetune(llama, reviews, *words, *fixed) == 130
    assert finetune("--resume", tmp_path / "out") == 0
    parts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert parts["loss_curve"] == whole["loss_curve"] and parts["after"] == whole["after"]


@pytest.mark.parametrize("package", ["bitsandbytes", "accelerate"])
def test_a_package_is_missing(package, bert, reviews, tmp_path, monkeypatch, capsys):
    if package == "accelerate":
        pytest.importorskip("bitsandbytes")
    monkeypatch.setitem(sys.modules, package, None)
    words = ["--label-column", "label", "--load-in-4bit", "--method", "lora"]
    assert finetune(bert, reviews, *words, "--output", tmp_path / "out") == 2
    assert f"load_in_4bit: got nothing (import of {package} halted" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "which writes into 4-bit weights; accepted: --w-update factored"),
        (["--method", "full"], "which trains the weights themselves"),
    ],
)
def test_what_would_write_4_bits_is_refused_before_loading(words, told, tmp_path, capsys):
    assert finetune("no-model", "no-data", "--load-in-4bit", *words) == 2
    assert told in capsys.readouterr().err


def test_a_gguf_file_stays_as_it_is(bnb, reviews, tmp_path, capsys):
    (tmp_path / "a.gguf").touch()
    words = ["--load-in-4bit", "--method", "lora", "--output", tmp_path / "out"]
    assert finetune(tmp_path / "a.gguf", reviews, *words) == 2
    assert "a GGUF file; accepted: a folder" in capsys.readouterr().err
