"""`--method`: which parameters each trains, how many, and that it learns and can be resumed."""

import argparse
import json
import os
import signal
import sys

import pytest
import torch

from deltadiff.diffora import rounds as diffora_rounds
from deltadiff.errors import ArgumentError
from deltadiff.finetune import command as finetune
from deltadiff.finetune import training
from deltadiff.finetune.methods import METHODS
from deltadiff.finetune.models import query_value
from deltadiff.finetune.settings import make_settings
from deltadiff.layers.lora_linear import lora_layers
from deltadiff.optim.adalora import AdaLoRA
from deltadiff.optim.delta_lora import DeltaLoRA
from deltadiff.optim.dylora import DyLoRA

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")

# The small BERT: hidden d = 32, ffn f = 64, 2 blocks, 23 words, 64 positions, 2 segments.
D, F = 32, 64
EMBEDDINGS = (23 + 64 + 2) * D
NORM = 2 * D
BLOCK = 4 * (D * D + D) + NORM + (D * F + F) + (F * D + D) + NORM
POOLER, HEAD = D * D + D, 2 * D + 2
ALL = EMBEDDINGS + NORM + 2 * BLOCK + POOLER + HEAD
BIASES = D + 2 * (4 * D + D + F + D + D) + D
PAIRS = 2 * (4 * 2 * D + 2 * (D + F)) + 2 * D  # of rank 1 on all linear layers, the pooler too
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
    "delta-lora": 4 * PAIRS + HEAD,
    "delta-lora-nearest": 4 * PAIRS + HEAD,
    "delta-lora-factored": 4 * PAIRS + HEAD,
}
DIFFORA = ("diffora", "diffora-no-sharing", "diffora-random", "diffora-delta-lora")
ADAPTERS = ("houlsby", "pfeiffer")  # AdapterHub's library is made for another transformers


def settings_for(method: str, model: str, data: str, **more):
    given = {"model": model, "data": data, "label_column": "label", "method": method, "r": 4}
    return make_settings(given | {"device": "cpu", "lr": 0.01, "steps": 20} | more)


def prepare(method, model, data, **more):
    settings = settings_for(method, model, data, **more)
    task = finetune.load_task(settings)
    return task, METHODS[method].prepare(task, settings)


def trained_names(module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.requires_grad}


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


def test_which_parameters_are_trained(bert, reviews):
    names = {m: trained_names(prepare(m, bert, reviews)[1].module) for m in COUNTS if "full" in m}
    embeddings = {n for n in names["full"] if "embeddings." in n and "LayerNorm" not in n}
    assert names["full-no-embeddings"] == names["full"] - embeddings
    assert len(embeddings) == 3
    matrices = {f"bert.encoder.layer.{i}.attention.self.{m}.weight" for i in (0, 1)
                for m in ("query", "value")}  # fmt: skip
    assert names["full-qv"] == matrices | {"classifier.weight", "classifier.bias"}


def test_the_optimizers_and_what_a_name_stands_for(bert, reviews):
    made = {m: prepare(m, bert, reviews, update_ratio=2.0)[1] for m in COUNTS if "peft" not in m}
    kinds = {m: type(p.optimizer) for m, p in made.items()}
    assert kinds["adalora"] is AdaLoRA and kinds["dylora"] is DyLoRA
    assert all(kinds[m] is torch.optim.AdamW for m in ("full", "full-qv", "bitfit"))
    for method in ("lora", "lora-alpha-control", "delta-lora", "delta-lora-factored"):
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


def run(tmp_path, method, model, data, *words) -> dict:
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    fixed = ["--label-column", "label", "--device", "cpu", "--lr", "0.01", "--method", method]
    args = [model, data, "--output", str(tmp_path / "out"), *fixed, *words]
    assert finetune.run(parser.parse_args(list(map(str, args)))) == 0
    return json.loads((tmp_path / "out" / "result.json").read_text())


@pytest.mark.parametrize("method", sorted(set(COUNTS) - {"lora", "lora-peft", "delta-lora"}))
def test_it_learns(method, bert, reviews, tmp_path):
    words = ["--lr", 0.03] if method == "adalora" else []
    result = run(tmp_path, method, bert, reviews, "--steps", 150, "--r", 4, *words)
    most = 0.99 if method == "bitfit" else 0.75  # biases do little in a model that knows nothing
    assert result["after"]["loss"] < most * result["before"]["loss"]
    assert result["trainable_parameters"] == COUNTS[method]
    kept = "model" if "full" in method or method == "bitfit" else "adapter"
    assert (tmp_path / "out" / kept).is_dir()


@pytest.mark.parametrize("method", ["full-qv", "bitfit"])
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_what_is_trained_is_float32_in_a_16_bit_model(method, dtype, bert, reviews, tmp_path):
    task, prepared = prepare(method, bert, reviews, dtype=dtype)
    trained = {p.dtype for p in prepared.module.parameters() if p.requires_grad}
    assert trained == {torch.float32}
    frozen = prepared.module.bert.encoder.layer[0].intermediate.dense.weight
    assert frozen.dtype == getattr(torch, dtype)
    result = run(tmp_path, method, bert, reviews, "--steps", 60, "--dtype", dtype)
    assert result["after"]["loss"] < result["before"]["loss"]


def test_the_saved_model_gives_the_same_predictions(bert, reviews, tmp_path):
    import transformers

    result = run(tmp_path, "full", bert, reviews, "--steps", 30)
    kind = transformers.AutoModelForSequenceClassification
    model = kind.from_pretrained(tmp_path / "out" / "model").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out" / "model")
    lines = (tmp_path / "out" / "predictions.csv").read_text().splitlines()[1:6]
    for line in lines:
        text, _, predicted, *logits = line.split(",")
        with torch.no_grad():
            found = model(**tokenizer([text], return_tensors="pt")).logits[0]
        torch.testing.assert_close(
            found, torch.tensor(list(map(float, logits))), rtol=1e-4, atol=1e-4
        )
        assert model.config.id2label[found.argmax().item()] == predicted
    assert result["weight_update"] is None


# --------------------------------------------------------------------------- DiffoRA

WIDTHS = dict.fromkeys(("query", "key", "value"), 2 * D)
WIDTHS = {f"attention.self.{name}": width for name, width in WIDTHS.items()}
WIDTHS |= {"attention.output.dense": 2 * D, "intermediate.dense": D + F, "output.dense": D + F}
SEARCH = ["--search-rounds", 3, "--inner-steps", 2, "--r", 4]


def chosen(output) -> dict[str, set[str]]:
    """Module type -> the blocks in which it got a pair of its own, from the adapter."""
    config = json.loads((output / "adapter" / "adapter.json").read_text())
    found: dict[str, set[str]] = {kind: set() for kind in WIDTHS}
    for layer, row in config["selection"]["layers"].items():
        for kind, selected in row.items():
            found[kind] |= {layer.rpartition(".")[2]} if selected else set()
    return found


@pytest.mark.parametrize("method", DIFFORA)
def test_diffora(method, bert, reviews, tmp_path):
    result = run(tmp_path, method, bert, reviews, "--steps", 60, *SEARCH)
    output = tmp_path / "out"
    selected = chosen(output)
    assert sum(map(len, selected.values())) == 2 * 3  # half of six, in each block
    own = sum(4 * WIDTHS[kind] * len(blocks) for kind, blocks in selected.items())
    shared = sum(2 * WIDTHS[kind] for kind, blocks in selected.items() if len(blocks) < 2)
    shared = 0 if method == "diffora-no-sharing" else shared
    assert result["trainable_parameters"] == own + shared + HEAD
    assert result["after"]["loss"] < result["before"]["loss"]
    assert not (output / "search.pt").exists()
    assert (result["weight_update"] is not None) == (method == "diffora-delta-lora")
    if method == "diffora-random":
        assert "search" not in result and not (output / "gates.json").exists()
        return
    gates = json.loads((output / "gates.json").read_text())["layers"]
    assert all(sum(row.values()) == pytest.approx(1) and len(row) == 6 for row in gates.values())
    for layer, row in gates.items():  # the largest three
        mine = {kind for kind, blocks in selected.items() if layer.rpartition(".")[2] in blocks}
        assert min(row[k] for k in mine) >= max(row[k] for k in set(row) - mine)
    assert (output / "gates.png").read_bytes().startswith(b"\x89PNG")
    assert len(result["search"]["validation_loss"]) == 3
    assert len(result["search"]["training_loss"]) == 6
    assert result["search"]["seconds"] > 0


def stop_at(monkeypatch, place, number: int) -> None:
    """Ctrl-C at the given call of ``batch_indices`` where ``place`` looks it up."""
    original, calls = place.batch_indices, []

    def indices(*args):
        calls.append(args)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGINT)
        return original(*args)

    monkeypatch.setattr(place, "batch_indices", indices)


@pytest.mark.parametrize("stage", ["search", "training"])
@pytest.mark.parametrize("more", [[], ["--warm-start", "--lora-dropout", 0.1]])
def test_diffora_goes_on_in_either_stage(stage, more, bert, reviews, tmp_path, monkeypatch):
    words = ["--steps", 12, *SEARCH, *more]
    (tmp_path / "whole").mkdir()
    whole = run(tmp_path / "whole", "diffora", bert, reviews, *words)
    place = {"search": diffora_rounds, "training": training}[stage]
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    out = str(tmp_path / "out")
    with monkeypatch.context() as patch:
        stop_at(patch, place, 5)
        args = [bert, reviews, "--output", out, "--label-column", "label", "--device", "cpu"]
        args += ["--lr", "0.01", "--method", "diffora", *map(str, words)]
        assert finetune.run(parser.parse_args(args)) == 130
    assert (tmp_path / "out" / "search.pt").exists()
    assert finetune.run(parser.parse_args(["--resume", out])) == 0
    parts = json.loads((tmp_path / "out" / "result.json").read_text())
    assert parts["loss_curve"] == whole["loss_curve"]
    assert parts["after"] == whole["after"]
    gates = [(tmp_path / d / "gates.json").read_text() for d in ("out", "whole/out")]
    assert gates[0] == gates[1]
    assert parts["search"]["seconds"] is None  # not all of it was here


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--ratio", 0.1], "ratio: got 0.1 of 6 modules"),
        (["--search-share", 0.01], "search_share: got 0.01 of 360 examples"),
        (["--search-share", 2], "share: got 2"),
        (["--target-modules", "query"], "target_modules: got one module in"),
        (["--gate-lr", -1], "gate_lr: got -1"),
        (["--use-rslora"], "use_rslora: got True"),
    ],
)
def test_a_search_that_cannot_be(words, told, bert, reviews, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    out = tmp_path / "out"
    args = [
        bert,
        reviews,
        "--label-column",
        "label",
        "--method",
        "diffora",
        "--output",
        out,
        *words,
    ]
    assert finetune.run(parser.parse_args(list(map(str, args)))) == 2
    assert told in capsys.readouterr().err
    assert not out.exists()


@pytest.mark.parametrize("method", ["delta-lora", "adalora", "diffora-delta-lora"])
def test_dropout_where_there_is_none(method, bert, reviews):
    with pytest.raises(ArgumentError, match="lora_dropout: got 0.1"):
        prepare(method, bert, reviews, lora_dropout=0.1)


# ------------------------------------------------------------------------ similarity


def test_similarity_of_a_known_change(bert, reviews):
    """The cosine of W and W + s B A, worked out in float64."""
    from deltadiff.finetune.models import load_model
    from deltadiff.finetune.report import similarity

    task, prepared = prepare("lora", bert, reviews, target_modules="query,dense")
    layer = prepared.module.bert.encoder.layer[1].attention.self.query
    with torch.no_grad():
        layer.lora_B.normal_(generator=torch.Generator().manual_seed(0))
    original = load_model(bert, "class", task.model.labels).module
    w = layer.weight.detach().double()
    v = w + layer.scaling * layer.lora_B.detach().double() @ layer.lora_A.detach().double()
    found = similarity(prepared.module, original)
    assert list(found) == ["attention.self.query"] and list(found["attention.self.query"]) == [
        "0",
        "1",
    ]
    assert found["attention.self.query"]["0"] == pytest.approx(1, abs=1e-12)
    cosine = (w * v).sum() / (w.norm() * v.norm())
    assert found["attention.self.query"]["1"] == pytest.approx(cosine.item(), abs=1e-6)


@pytest.mark.parametrize("method", ["full", "delta-lora", "delta-lora-factored", "lora-peft"])
def test_similarity_is_in_the_result(method, bert, reviews, tmp_path):
    result = run(tmp_path, method, bert, reviews, "--steps", 30)
    places = result["similarity"]
    assert len(places) == 6 and all(list(blocks) == ["0", "1"] for blocks in places.values())
    assert all(0 < c < 1 for blocks in places.values() for c in blocks.values())
    assert (tmp_path / "out" / "similarity.png").read_bytes().startswith(b"\x89PNG")


# ------------------------------------------------------------------------- bad input


def test_qv_names_the_layers_of_attention(bert, llama):
    import transformers

    names = query_value(transformers.AutoModel.from_pretrained(bert))
    assert [n.rpartition(".")[2] for n in names] == ["query", "value"] * 2
    names = query_value(transformers.AutoModelForCausalLM.from_pretrained(llama))
    assert [n.rpartition(".")[2] for n in names] == ["q_proj", "v_proj"] * 2
    with pytest.raises(ArgumentError, match="target_modules: got qv"):
        query_value(torch.nn.Sequential(torch.nn.Linear(2, 2)))


def test_qv_as_target_modules(bert, reviews):
    _, prepared = prepare("lora", bert, reviews, target_modules="qv")
    assert len(lora_layers(prepared.module)) == 4


def test_a_model_without_biases_has_no_bitfit(llama, reviews, tmp_path, capsys):
    parser = argparse.ArgumentParser()
    finetune.add_arguments(parser)
    words = [llama, reviews, "--method", "bitfit", "--output", str(tmp_path / "out")]
    assert finetune.run(parser.parse_args(words)) == 2
    assert "method: got bitfit, of whose parameters this model has none" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_say_why_not(method, bert, reviews, monkeypatch):
    monkeypatch.setitem(sys.modules, "adapters", None)
    with pytest.raises(ArgumentError, match=f"method: got {method}: adapters") as caught:
        prepare(method, bert, reviews)
    assert "/" not in caught.value.given  # no path of this machine


@pytest.mark.parametrize("method", ADAPTERS)
def test_adapters_train_and_generate(method, bert, llama, reviews):
    pytest.importorskip("adapters", exc_type=ImportError)
    _, prepared = prepare(method, bert, reviews)
    names = trained_names(prepared.module)
    assert names == {n for n in names if ".adapters." in n or n.startswith("classifier.")}
    places = {n.partition(".adapters.")[0] for n in names if ".adapters." in n}
    assert len(places) == 2 * (2 if method == "houlsby" else 1)  # of 2 blocks

    task, prepared = prepare(method, llama, reviews, label_column=None)
    module = prepared.module.eval()
    given = {"input_ids": torch.tensor([[3, 4, 5]]), "attention_mask": torch.ones(1, 3).long()}
    found = module.generate(**given, max_new_tokens=5, do_sample=False, eos_token_id=None)[0]
    for n in range(3, len(found)):  # as a pass over the whole text says
        logits = module(input_ids=found[None, :n]).logits
        assert found[n] == logits[0, -1].argmax()
    assert len(found) == 8


def test_an_option_that_the_name_contradicts(bert, reviews):
    with pytest.raises(ArgumentError, match="rounding: got 'stochastic'"):
        settings_for("delta-lora-nearest", bert, reviews, rounding="stochastic").check()
