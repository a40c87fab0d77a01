"""Each method: which parameters it trains, how many, and that it learns."""

import pytest
import torch
from finetune_runs import prepare, settings_for, train_method
from ranks import short_form

from deltadiff.errors import ArgumentError
from deltadiff.finetune.methods.table import METHODS
from deltadiff.layers.lora_layers import lora_layers
from deltadiff.optim.adalora import AdaLoRA
from deltadiff.optim.delta_lora import DeltaLoRA
from deltadiff.optim.dylora import DyLoRA

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

# Parameters of the small BERT: hidden size 32, feed-forward size 64, 2 blocks, 23 words,
# 64 positions, 2 segments.
D, F = 32, 64
EMBEDDINGS = (23 + 64 + 2) * D
NORM = 2 * D
BLOCK = 4 * (D * D + D) + NORM + (D * F + F) + (F * D + D) + NORM
POOLER, HEAD = D * D + D, 2 * D + 2
ALL = EMBEDDINGS + NORM + 2 * BLOCK + POOLER + HEAD
BIASES = D + 2 * (4 * D + D + F + D + D) + D
PAIRS = 2 * (4 * 2 * D + 2 * (D + F)) + 2 * D  # rank 1 on all linear layers, the pooler too
COUNTS = {
    "full": ALL,
    "full-no-embeddings": ALL - EMBEDDINGS,
    "full-qv": 2 * 2 * D * D + HEAD,
    "bitfit": BIASES + HEAD,
    "lora-peft": 4 * PAIRS + HEAD,
    "lora": 4 * PAIRS + HEAD,
    "lora-alpha-control": 4 * PAIRS + HEAD,
    "adalora": 6 * PAIRS + 6 * 13 + HEAD,  # rank 1.5 r, and a singular value for each
    "dylora": 4 * PAIRS + HEAD,
    "flora": 4 * PAIRS + 13 * 4 * 4 + HEAD,  # and a core for each
    "delta-lora": 4 * PAIRS + HEAD,
    "delta-lora-nearest": 4 * PAIRS + HEAD,
    "delta-lora-factored": 4 * PAIRS + HEAD,
}
DIFFORA = ("diffora", "diffora-no-sharing", "diffora-random", "diffora-delta-lora")
ADAPTERS = ("houlsby", "pfeiffer")  # counted in test_libraries, if AdapterHub's library is there


@pytest.mark.parametrize("method", COUNTS)
def test_the_number_of_trained_parameters(method, bert, reviews):
    if method == "lora-peft":
        pytest.importorskip("peft")
    _, prepared = prepare(method, bert, reviews)
    trained = [p for p in prepared.module.parameters() if p.requires_grad]
    assert sum(p.numel() for p in trained) == COUNTS[method]
    held = {id(p) for group in prepared.optimizer.param_groups for p in group["params"]}
    assert held == {id(p) for p in trained}


def test_every_method_is_counted_here():
    assert set(COUNTS) | set(ADAPTERS) | set(DIFFORA) == set(METHODS)


def test_the_optimizers_and_what_a_name_stands_for(bert, reviews):
    made = {m: prepare(m, bert, reviews, update_ratio=2.0)[1] for m in COUNTS if "peft" not in m}
    kinds = {m: type(p.optimizer) for m, p in made.items()}
    assert kinds["adalora"] is AdaLoRA and kinds["dylora"] is DyLoRA
    assert all(kinds[m] is torch.optim.AdamW for m in ("full", "full-qv", "bitfit"))
    for method in ("lora", "lora-alpha-control", "flora", "delta-lora", "delta-lora-factored"):
        assert kinds[method] is DeltaLoRA
    ratios = {m: p.optimizer.param_groups[0].get("update_ratio") for m, p in made.items()}
    assert (ratios["lora"], ratios["lora-alpha-control"], ratios["delta-lora"]) == (0.0, 0.0, 2.0)
    assert made["delta-lora-factored"].optimizer.w_update == "factored"
    assert made["delta-lora-nearest"].optimizer.rounding == "nearest"
    alphas = {m: next(iter(lora_layers(made[m].module).values())).lora_alpha for m in
              ("lora", "lora-alpha-control", "delta-lora")}  # fmt: skip
    assert alphas == {"lora": 16, "lora-alpha-control": 16 * (1 + 2.0), "delta-lora": 16}


def test_weight_decay_reaches_every_optimizer(bert, reviews):
    for method in COUNTS:
        _, prepared = prepare(method, bert, reviews, weight_decay=0.25)
        assert {g["weight_decay"] for g in prepared.optimizer.param_groups} == {0.25}


LEARNS = sorted(set(COUNTS) - {"lora", "lora-peft", "delta-lora"})


@pytest.mark.parametrize("method", short_form(LEARNS, *(set(LEARNS) - {"flora"})))
def test_it_learns(method, bert, reviews, tmp_path):
    words = ["--lr", 0.03] if method == "adalora" else []
    result = train_method(tmp_path / "out", method, bert, reviews, "--steps", 150, "--r", 4, *words)
    most = 0.99 if method == "bitfit" else 0.75  # biases do little in a model that knows nothing
    assert result["after"]["loss"] < most * result["before"]["loss"]
    assert result["trainable_parameters"] == COUNTS[method]
    kept = "model" if "full" in method or method == "bitfit" else "adapter"
    assert (tmp_path / "out" / kept).is_dir()


@pytest.mark.parametrize("method", ["delta-lora", "adalora", "diffora-delta-lora"])
def test_dropout_where_there_is_none(method, bert, reviews):
    with pytest.raises(ArgumentError, match="lora_dropout: got 0.1"):
        prepare(method, bert, reviews, lora_dropout=0.1)


def test_an_option_that_the_name_contradicts(bert, reviews):
    with pytest.raises(ArgumentError, match="rounding: got 'stochastic'"):
        settings_for("delta-lora-nearest", bert, reviews, rounding="stochastic").check()
