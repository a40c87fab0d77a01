"""benchmarks/compare_methods.py: the texts that it writes, and the commands that it runs."""

import csv
import importlib.util
import json
import sys
from pathlib import Path

import pytest

from deltadiff.finetune.compare.cases import SWEEPS
from deltadiff.finetune.compare.claims import TASK_TITLES
from deltadiff.finetune.methods.table import METHODS
from deltadiff.finetune.paired_metrics import PAIRED_METRICS

FILE = Path(__file__).parents[2] / "benchmarks" / "compare_methods.py"


@pytest.fixture(scope="module")
def script():
    spec = importlib.util.spec_from_file_location("compare_methods", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules["compare_methods"] = module  # where dataclasses look for their annotations
    spec.loader.exec_module(module)
    yield module
    del sys.modules["compare_methods"]


@pytest.fixture
def raw(tmp_path):
    """A folder with a little text in the form of each source."""
    folder = tmp_path / "raw"
    folder.mkdir()
    pairs = "".join(f'"name[{i % 50}]","text {i}"\n' for i in range(2000))
    ratings = "".join(f"{i}\t{i / 10}\tt {i}\n" for i in range(10))
    files = {
        "sst2.train": "".join(f"{i % 2} film {i}\n" for i in range(50)),
        "sst2.dev": "1 a b c\n0 d\n",
        "cola.in_domain_train.tsv": "gj04\t1\t\tA sentence.\nbc01\t0\t*\tSentence a.\n",
        "cola.in_domain_dev.tsv": "gj04\t1\t\tOne more.\n",
        "cola.out_of_domain_dev.tsv": "gj04\t0\t*\tMore one.\n",
        "movieReviewSnippets_GroundTruth.txt": ratings,
        "e2e.devset.csv": f"mr,ref\n{pairs}", "e2e.testset_w_refs.csv": f'"mr","ref"\n{pairs}',
    }  # fmt: skip
    for name, text in files.items():
        (folder / name).write_text(text)
    return folder


def _rows(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_the_texts(script, raw, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "_write_encoder", lambda folder: None)
    script.prepare(tmp_path / "in", raw)
    assert _rows(tmp_path / "in" / "sst2.heldout.csv") == [
        ["label", "text"], ["1", "a b c"], ["0", "d"],
    ]  # fmt: skip
    assert _rows(tmp_path / "in" / "cola.heldout.csv")[1:] == [
        ["1", "One more."],
        ["0", "More one."],
    ]
    train, held = (
        _rows(tmp_path / "in" / f"vader.{part}.csv")[1:] for part in ("train", "heldout")
    )
    assert len(train) == 8 and len(held) == 2
    assert sorted(train + held) == [[f"{i / 10}", f"t {i}"] for i in range(10)]
    held = _rows(tmp_path / "in" / "e2e.heldout.csv")[1:]
    assert len(held) == 1000  # 25 prompts of 40, each with all of its references
    assert len({prompt for prompt, _ in held}) == 25

    (raw / "sst2.dev").unlink()
    script.prepare(tmp_path / "less", raw, most=5)
    assert "sst2: left out, without" in capsys.readouterr().out
    assert not list((tmp_path / "less").glob("sst2*"))
    assert len(_rows(tmp_path / "less" / "cola.train.csv")) == 3
    assert len(_rows(tmp_path / "less" / "e2e.train.csv")) == 6


def test_the_commands(script, tmp_path, monkeypatch):
    ran, codes = [], iter([0, 1, 0, 3])
    monkeypatch.setattr(script, "deltadiff", lambda words: ran.append(words) or next(codes))
    for name, task in script.TASKS.items():
        (tmp_path / task.model).mkdir(exist_ok=True)
        (tmp_path / f"{name}.train.csv").touch()
    words = ["run", str(tmp_path), str(tmp_path / "out"), "--jobs", "8", "--time-limit", "7"]
    assert script.main([*words, "--options", "--steps", "3"]) == 3  # where the time was up
    assert len(ran) == 4 and all(words[-2:] != ["--steps", "3"] for words in ran)
    for words in ran:
        assert words[0] == "compare" and "--tune-lr" in words and words.index("--steps")
        assert 0 < float(words[words.index("--time-limit") + 1]) <= 7
    with pytest.raises(SystemExit, match="there is no"):
        script.main(["run", str(tmp_path / "nowhere"), str(tmp_path / "out")])


def test_what_it_names_is_there(script):
    assert set(script.METHODS) <= set(METHODS)
    assert set(script.SWEEPS) == set(SWEEPS) and set(script.COMPARISONS) == set(TASK_TITLES)
    for task in script.TASKS.values():
        named = [word for word in task.words if word in PAIRED_METRICS]
        assert len(named) == ("--metric" in task.words)


def test_what_is_kept(script, tmp_path, monkeypatch):
    output, results = tmp_path / "out" / "sst2", tmp_path / "results"
    output.mkdir(parents=True)
    results.mkdir()
    monkeypatch.setattr(script, "RESULTS", results)
    final = {"op": "compare", "stage": "final", "metric": "loss", "by": "accuracy"}
    tuning = [final | {"stage": "tuning", "metric": m} for m in ("loss", "accuracy")]
    difference = {"op": "compare_difference", "metric": "accuracy"}
    (output / "compare-sst2-a-gpu.json").write_text(json.dumps([final, *tuning, difference]))
    script.keep(tmp_path / "out")
    (path,) = results.iterdir()
    assert path.name == "methods-sst2-a-gpu.json"
    assert json.loads(path.read_text()) == [final, tuning[1], difference]
