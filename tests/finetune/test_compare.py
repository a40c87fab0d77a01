"""`deltadiff compare` on tiny models: records, tables, going on, what cannot run, bad input."""

import json
import statistics
import sys

import pytest
import torch

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError, Interrupted, NonFiniteLossError
from deltadiff.finetune import compare, compare_report
from deltadiff.finetune.methods import METHODS

for package in ("transformers", "tqdm", "matplotlib"):
    pytest.importorskip(package)
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
FIXED = ["--label-column", "label", "--device", "cpu", "--steps", "6", "--lr", "0.01"]


def run(model, data, output, *words) -> int:
    return main(["compare", model, data, "--output", str(output), *FIXED, *map(str, words)])


def load(output) -> list[dict]:
    (path,) = output.glob("compare-*.json")
    return json.loads(path.read_text())


@pytest.fixture(scope="module")
def done(bert, reviews, tmp_path_factory):
    """A comparison that ran, with a method that cannot: (folder, records)."""
    output = tmp_path_factory.mktemp("compare") / "out"
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "adapters", None)
        words = ["--methods", "full", "lora,delta-lora", "houlsby", "--seeds", 2]
        words += ["--start-step", 1]
        assert run(bert, reviews, output, *words) == 0
    return output, load(output)


def test_the_records(done, bert):
    _, records = done
    ran = [r for r in records if r["note"] is None]
    assert {(r["method"], r["seed"]) for r in ran} == {
        (method, seed) for method in ("full", "lora", "delta-lora") for seed in (0, 1)
    }
    metrics = {r["metric"] for r in ran}
    assert {"accuracy", "loss"} <= metrics and len(ran) == 6 * len(metrics)
    for r in records:
        assert (r["op"], r["task"]) == ("compare", "reviews")
        assert (r["steps"], r["lr"], r["r"], r["update_ratio"]) == (6, 0.01, 8, 0.5)
        assert {"gpu", "driver", "torch", "triton", "commit", "model", "data"} <= set(r)
        assert not any(isinstance(v, (dict, list)) for v in r.values())
        assert r["model"] == bert.rpartition("/")[2]  # a name and no path of this machine
        assert r["peak_mib"] is None  # on a CPU, runs of one process are not told apart
    for r in ran:
        assert (
            r["seconds"] > 0
            and r["step_ms"] > 0
            and r["trainable"] > 0
            and isinstance(r["value"], float)
        )
        assert (r["share"] is not None) == (r["method"] == "delta-lora")
    by_seed = [[r["value"] for r in ran if r["seed"] == seed] for seed in (0, 1)]
    assert by_seed[0] != by_seed[1]


def test_a_run_is_what_finetune_gives(done, bert, reviews, tmp_path):
    _, records = done
    words = ["--method", "delta-lora", "--seed", "1", "--output", str(tmp_path / "one")]
    words += ["--start-step", "1"]
    assert main(["finetune", bert, reviews, *FIXED, *words]) == 0
    result = json.loads((tmp_path / "one" / "result.json").read_text())
    mine = [r for r in records if (r["method"], r["seed"]) == ("delta-lora", 1)]
    assert {r["metric"]: r["value"] for r in mine} == result["after"]
    assert mine[0]["before"] == result["before"][mine[0]["metric"]]


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
    header, *rows = compare_report.table(records)
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
    assert compare_report.spread([0.25]) == "0.250"
    assert compare_report.spread([0.0, 2.0]) == "1.000 ± 1.414"


def test_it_goes_on_and_runs_nothing_twice(done, bert, reviews, monkeypatch, capsys):
    output, records = done
    ran = []
    real = compare.finetune

    def finetune(settings, **more):
        ran.append((settings.method, settings.seed))
        return real(settings, **more)

    monkeypatch.setattr(compare, "finetune", finetune)
    monkeypatch.setitem(sys.modules, "adapters", None)
    words = ["--methods", "full", "lora", "delta-lora", "houlsby", "bitfit", "--seeds", 2]
    words += ["--start-step", 1]
    assert run(bert, reviews, output, *words) == 0
    # What ran stays; what could not start is tried again: it may be installed by now.
    assert ran == [("houlsby", 0), ("bitfit", 0), ("houlsby", 1), ("bitfit", 1)]
    found = load(output)
    assert all(r in found for r in records)
    assert "10/10 bitfit seed 1: accuracy" in capsys.readouterr().out


def test_other_settings_are_not_mixed_in(done, bert, reviews, capsys):
    output, _ = done
    code = run(bert, reviews, output, "--methods", "lora", "--seeds", 1, "--start-step", 2)
    assert code == 2
    told = capsys.readouterr().err
    assert "where start_step was 1 and not 2" in told and told.count("\n") == 1


def test_stopping(bert, reviews, tmp_path, monkeypatch, capsys):
    real, ran = compare.finetune, []

    def finetune(settings, **more):
        ran.append(settings.method)
        if len(ran) == 2:
            raise Interrupted("checkpoint")
        return real(settings, **more)

    monkeypatch.setattr(compare, "finetune", finetune)
    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    assert run(bert, reviews, tmp_path / "out", *words) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert run(bert, reviews, tmp_path / "out", *words) == 0
    assert ran == ["lora", "bitfit", "bitfit"]


def test_a_run_that_fails_is_a_note_and_exit_code_1(bert, reviews, tmp_path, monkeypatch):
    real = compare.finetune

    def finetune(settings, **more):
        if settings.method == "lora":
            raise NonFiniteLossError("the loss is nan at step 3")
        return real(settings, **more)

    monkeypatch.setattr(compare, "finetune", finetune)
    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    assert run(bert, reviews, tmp_path / "out", *words) == 1
    notes = {r["method"]: r["note"] for r in load(tmp_path / "out")}
    assert notes == {"lora": "failed: the loss is nan at step 3", "bitfit": None}
    (failed,) = [r for r in load(tmp_path / "out") if r["method"] == "lora"]
    assert failed["metric"] is None and failed["value"] is None and failed["trainable"] is None
    assert run(bert, reviews, tmp_path / "out", *words) == 1  # it is not run again


def test_an_error_of_one_method_does_not_end_the_others(bert, reviews, tmp_path, monkeypatch):
    real = compare.finetune

    def finetune(settings, **more):
        if settings.method == "lora":
            raise RuntimeError("a kernel did not compile")
        return real(settings, **more)

    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    with monkeypatch.context() as patch:
        patch.setattr(compare, "finetune", finetune)
        assert run(bert, reviews, tmp_path / "out", *words) == 1
    notes = {r["method"]: r["note"] for r in load(tmp_path / "out")}
    assert notes == {"lora": "failed: RuntimeError: a kernel did not compile", "bitfit": None}
    assert "Traceback" in (tmp_path / "out" / "runs" / "lora-seed0.log").read_text()
    assert run(bert, reviews, tmp_path / "out", *words) == 0  # it is tried again


@pytest.mark.parametrize("alone", [True, False])
def test_memory_that_others_took_may_be_free_later(alone, bert, reviews, tmp_path, monkeypatch):
    ran = []

    def finetune(settings, **more):
        ran.append(settings)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(compare, "finetune", finetune)
    given = {"model": bert, "data": reviews, "device": "cpu"}
    (case,) = compare.cases(given, tmp_path, ["lora"], seeds=1)
    for _ in range(2):
        (record,) = compare.run_case(case, "reviews", alone)
        assert record["note"] == "failed: CUDA out of memory"
    assert len(ran) == (1 if alone else 2)


def test_epochs_become_steps_in_the_records(bert, reviews, tmp_path):
    words = ["--label-column", "label", "--device", "cpu", "--epochs", "0.2", "--seeds", "1"]
    words += ["--methods", "bitfit", "--output", str(tmp_path / "out")]
    for _ in range(2):  # the second time from what is there
        assert main(["compare", bert, reviews, *words]) == 0
        assert {r["steps"] for r in load(tmp_path / "out")} == {3}  # 360 / 5 texts, 32 a step


def test_several_jobs_leave_the_times_out(bert, reviews, tmp_path):
    words = ["--methods", "lora", "bitfit", "--seeds", 1, "--jobs", 2]
    assert run(bert, reviews, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["method"] for r in records} == {"lora", "bitfit"}
    assert {r["seconds"] for r in records} == {r["step_ms"] for r in records} == {None}
    assert run(bert, reviews, tmp_path / "one", *words[:-2]) == 0
    values = [[r["value"] for r in found] for found in (records, load(tmp_path / "one"))]
    # Sums may be in another order there: the processes share the cores.
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_options_of_some_methods_alone(bert, reviews, tmp_path):
    words = ["--methods", "full", "full-qv", "lora", "--seeds", 1, "--steps", 2]
    words += ["--set", "full*.lr=2e-4", "lora.target-modules=query,value"]
    assert run(bert, reviews, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["method"]: r["lr"] for r in records} == {"full": 2e-4, "full-qv": 2e-4, "lora": 0.01}
    assert {r["target_modules"] for r in records if r["method"] == "lora"} == {"query,value"}
    header, *rows = compare_report.table(records)
    assert [row[header.index("lr")] for row in rows] == ["0.0002", "0.0002", "0.01"]


@pytest.mark.parametrize(
    ("sweep", "methods", "values"),
    [
        ("lambda", {"delta-lora", "lora-alpha-control"}, [0, 1, 2, 3, 4, 5]),
        ("k", {"delta-lora"}, [0, 1, 2, 3, 4, 5]),
        ("ratio", {"diffora", "diffora-random"}, [0.2, 0.4, 0.5, 0.7, 0.9]),
        ("sharing", {"diffora"}, [0, 2]),
    ],
)
def test_the_cases_of_a_sweep(sweep, methods, values, tmp_path):
    given = {"model": "m", "data": "d", "steps": 6}
    found = compare.cases(given, tmp_path, [], 2, [sweep])
    assert {case.settings.method for case in found} == methods
    assert sorted({case.x for case in found}) == values
    assert len(found) == len(values) * len(methods) * 2
    assert len({case.folder for case in found}) == len(found)
    field = compare.SWEEPS[sweep].field
    assert all(getattr(case.settings, field) == case.x for case in found)


def test_k_is_swept_as_in_the_paper_where_the_run_is_long_enough(tmp_path):
    given = {"model": "m", "data": "d", "steps": 2000}
    found = compare.cases(given, tmp_path, [], 1, ["k"])
    assert [case.x for case in found] == list(range(0, 1001, 100))


def test_a_sweep(bert, reviews, tmp_path):
    words = ["--methods", "lora", "--sweep", "lambda", "--values", 0, 2, "--seeds", 2]
    assert run(bert, reviews, tmp_path / "out", *words, "--start-step", 1) == 0
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
    header, *rows = compare_report.table(records)
    assert [row[1] for row in rows] == ["", "lambda 0", "lambda 2", "lambda 0", "lambda 2"]


# ------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--methods", "lora", "dora"], "methods: got 'dora'"),
        (["--seeds", "0"], "seeds: got 0"),
        (["--jobs", "0"], "jobs: got 0"),
        (["--steps", "0"], "steps: got 0"),
        (["--set", "lr=3"], "set: got 'lr=3'"),
        (["--set", "dora.lr=3"], "set: got 'dora.lr=3'"),
        (["--set", "lora.speed=3"], "speed: got '3'"),
        (["--set", "lora.lr=fast"], "lr: got 'fast'"),
        (["--values", "1"], "values: got [1.0]"),
        (["--sweep", "lambda", "--values", "-1"], "update_ratio"),
        (["--methods", "lora", "--label-column", "stars"], "label_column: got 'stars'"),
        (["--methods", "lora", "--output", "{full}"], "output: got"),
        (["--preset", "none"], "preset: got 'none'"),
    ],
)
def test_bad_input(words, told, bert, reviews, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a file").touch()
    words = [w.format(full=full) for w in words]
    assert run(bert, reviews, tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_model_or_data(capsys):
    assert main(["compare"]) == 2
    assert "model: got nothing" in capsys.readouterr().err


def test_a_preset_is_for_all_methods(tmp_path):
    given = {"model": "m", "data": "d", "preset": "delta-lora/e2e"}
    found = compare.cases(given, tmp_path, ["lora", "full"], 1)
    assert {(case.settings.r, case.settings.epochs, case.settings.num_beams) for case in found} == {
        (4, 5.0, 10)
    }
    with pytest.raises(ArgumentError):
        compare.cases(given | {"preset": "none"}, tmp_path, ["lora"], 1)
