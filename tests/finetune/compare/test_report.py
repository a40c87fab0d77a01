"""Tables and files of a comparison, made from its records."""

import statistics

import pytest
from comparisons import compare, load

from deltadiff.finetune.compare import report
from deltadiff.finetune.methods.table import METHODS

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_what_is_left(done):
    output, _ = done
    endings = [".json", ".txt", ".md", "-metrics.png", "-loss.png", "-similarity.png"]
    (stem,) = {p.name.removesuffix(".json") for p in output.glob("*.json")}
    assert {p.name for p in output.glob("compare-*")} == {stem + ending for ending in endings}
    assert not list(output.rglob("*.safetensors"))  # the figures, not the weights
    for path in output.glob("compare-*.png"):
        assert path.read_bytes().startswith(b"\x89PNG")


def test_the_table(done):
    output, records = done
    header, *rows = report.table(records)
    rows = {row[0]: dict(zip(header, row, strict=True)) for row in rows}
    assert list(rows) == [METHODS[m].text for m in ("full", "lora", "delta-lora", "houlsby")]
    losses = [r["value"] for r in records if (r["method"], r["metric"]) == ("lora", "loss")]
    mean, deviation = statistics.fmean(losses), abs(losses[0] - losses[1]) / 2**0.5
    assert rows["LoRA"]["loss"] == f"{mean:.3f} ± {deviation:.3f}"
    assert rows["LoRA"]["seeds"] == "2"
    assert rows["Houlsby adapters"] == {"method": "Houlsby adapters", "seeds": "0"} | {
        name: "" for name in header if name not in ("method", "seeds")
    }
    (text,) = [p.read_text() for p in output.glob("*.txt")]
    (markdown,) = [p.read_text() for p in output.glob("*.md")]
    for told in (text, markdown):
        assert f"{mean:.3f} ± {deviation:.3f}" in told
        assert "Houlsby adapters: cannot run: houlsby: adapters" in told
        assert "6 steps of 32" in told
    lines = [line for line in markdown.splitlines() if line.startswith("|")]
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


def test_one_seed_has_no_deviation():
    assert report.spread([0.25]) == "0.250"
    assert report.spread([0.0, 2.0]) == "1.000 ± 1.414"


def test_options_of_some_methods_alone(bert, reviews, tmp_path):
    words = ["--methods", "full", "full-qv", "lora", "--seeds", 1, "--steps", 2]
    words += ["--set", "full*.lr=2e-4", "lora.target-modules=query,value"]
    assert compare(bert, reviews, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["method"]: r["lr"] for r in records} == {"full": 2e-4, "full-qv": 2e-4, "lora": 0.01}
    assert {r["target_modules"] for r in records if r["method"] == "lora"} == {"query,value"}
    header, *rows = report.table(records)
    assert [row[header.index("lr")] for row in rows] == ["0.0002", "0.0002", "0.01"]


@pytest.mark.long
def test_a_sweep(bert, reviews, tmp_path):
    words = ["--methods", "lora", "--sweep", "lambda", "--values", 0, 2, "--seeds", 2]
    assert compare(bert, reviews, tmp_path / "out", *words, "--start-step", 1) == 0
    records = load(tmp_path / "out")
    assert {(r["method"], r["sweep"], r["x"]) for r in records} == {
        ("lora", None, None), ("delta-lora", "lambda", 0.0), ("delta-lora", "lambda", 2.0),
        ("lora-alpha-control", "lambda", 0.0), ("lora-alpha-control", "lambda", 2.0),
    }  # fmt: skip
    values = {
        (r["method"], r["x"]): r["value"]
        for r in records
        if (r["metric"], r["seed"]) == ("loss", 0)
    }
    same = {values["lora", None], values["delta-lora", 0.0], values["lora-alpha-control", 0.0]}
    assert len(same) == 1  # lambda = 0 is LoRA
    assert values["delta-lora", 2.0] not in same
    assert list((tmp_path / "out").glob("compare-*-sweep-lambda.png"))
    header, *rows = report.table(records)
    assert [row[1] for row in rows] == ["", "lambda 0", "lambda 2", "lambda 0", "lambda 2"]
