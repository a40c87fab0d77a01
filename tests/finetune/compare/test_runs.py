"""The runs of a comparison: their records, going on, and runs that fail."""

import json
import shutil
import sys

import pytest
import torch
from comparisons import FIXED, compare, load
from finetune_runs import flip_a_bit

from deltadiff.__main__ import main
from deltadiff.errors import Interrupted, NonFiniteLossError
from deltadiff.finetune.compare import runs
from deltadiff.finetune.compare.cases import cases

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


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
        assert r["model"] == bert.rpartition("/")[2]  # a name, not a path
        assert r["peak_mib"] is None  # the runs share a process, and so its peak on a CPU
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


def test_it_goes_on_and_runs_nothing_twice(done, bert, reviews, tmp_path, monkeypatch, capsys):
    earlier, records = done
    output = shutil.copytree(earlier, tmp_path / "out")
    ran, real = [], runs.finetune

    def finetune(settings, **more):
        ran.append((settings.method, settings.seed))
        return real(settings, **more)

    monkeypatch.setattr(runs, "finetune", finetune)
    monkeypatch.setitem(sys.modules, "adapters", None)
    words = ["--methods", "full", "lora", "delta-lora", "houlsby", "bitfit", "--seeds", 2]
    words += ["--start-step", 1]
    assert compare(bert, reviews, output, *words) == 0
    # A method that could not start is tried again, because its package may be installed by now.
    assert ran == [("houlsby", 0), ("bitfit", 0), ("houlsby", 1), ("bitfit", 1)]
    found = load(output)
    assert all(r in found for r in records)
    assert "10/10 bitfit seed 1: accuracy" in capsys.readouterr().out


def test_stopping(bert, reviews, tmp_path, monkeypatch, capsys):
    real, ran = runs.finetune, []

    def finetune(settings, **more):
        ran.append(settings.method)
        if len(ran) == 2:
            raise Interrupted("checkpoint")
        return real(settings, **more)

    monkeypatch.setattr(runs, "finetune", finetune)
    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    assert compare(bert, reviews, tmp_path / "out", *words) == 130
    assert "the same command goes on" in capsys.readouterr().out
    assert compare(bert, reviews, tmp_path / "out", *words) == 0
    assert ran == ["lora", "bitfit", "bitfit"]


def test_a_run_that_fails_is_a_note_and_exit_code_1(bert, reviews, tmp_path, monkeypatch):
    real = runs.finetune

    def finetune(settings, **more):
        if settings.method == "lora":
            raise NonFiniteLossError("the loss is nan at step 3")
        return real(settings, **more)

    monkeypatch.setattr(runs, "finetune", finetune)
    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    assert compare(bert, reviews, tmp_path / "out", *words) == 1
    notes = {r["method"]: r["note"] for r in load(tmp_path / "out")}
    assert notes == {"lora": "diverged: the loss is nan at step 3", "bitfit": None}
    (failed,) = [r for r in load(tmp_path / "out") if r["method"] == "lora"]
    assert failed["metric"] is None and failed["value"] is None and failed["trainable"] is None
    assert compare(bert, reviews, tmp_path / "out", *words) == 1  # it is not run again


def test_an_error_of_one_method_does_not_end_the_others(bert, reviews, tmp_path, monkeypatch):
    real = runs.finetune

    def finetune(settings, **more):
        if settings.method == "lora":
            raise RuntimeError("a kernel did not compile")
        return real(settings, **more)

    words = ["--methods", "lora", "bitfit", "--seeds", 1]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finetune", finetune)
        assert compare(bert, reviews, tmp_path / "out", *words) == 1
    notes = {r["method"]: r["note"] for r in load(tmp_path / "out")}
    assert notes == {"lora": "failed: RuntimeError: a kernel did not compile", "bitfit": None}
    assert "Traceback" in (tmp_path / "out" / "runs" / "lora-seed0.log").read_text()
    assert compare(bert, reviews, tmp_path / "out", *words) == 0  # it is tried again


@pytest.mark.parametrize("alone", [True, False])
def test_memory_that_others_took_may_be_free_later(alone, bert, reviews, tmp_path, monkeypatch):
    ran = []

    def finetune(settings, **more):
        ran.append(settings)
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(runs, "finetune", finetune)
    given = {"model": bert, "data": reviews, "device": "cpu"}
    (case,) = cases(given, tmp_path, ["lora"], seeds=1)
    for _ in range(2):
        (record,) = runs.run_case(case, "reviews", alone)
        assert record["note"] == "failed: CUDA out of memory"
    assert len(ran) == (1 if alone else 2)


def test_epochs_become_steps_in_the_records(bert, reviews, tmp_path):
    words = ["--label-column", "label", "--device", "cpu", "--epochs", "0.2", "--seeds", "1"]
    words += ["--methods", "bitfit", "--output", str(tmp_path / "out")]
    for _ in range(2):  # the second time reads the records of the first
        assert main(["compare", bert, reviews, *words]) == 0
        assert {r["steps"] for r in load(tmp_path / "out")} == {3}  # 360 / 5 texts in steps of 32


@pytest.mark.long
def test_several_jobs_leave_the_times_out(bert, reviews, tmp_path):
    words = ["--methods", "lora", "bitfit", "--seeds", 1, "--jobs", 2]
    assert compare(bert, reviews, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["method"] for r in records} == {"lora", "bitfit"}
    assert {r["seconds"] for r in records} == {r["step_ms"] for r in records} == {None}
    assert compare(bert, reviews, tmp_path / "one", *words[:-2]) == 0
    values = [[r["value"] for r in found] for found in (records, load(tmp_path / "one"))]
    # The processes share the cores, so sums may be in another order.
    assert values[0] == pytest.approx(values[1], rel=1e-5)


def test_a_result_whose_records_are_missing_is_not_lost(done, bert, reviews, tmp_path, monkeypatch):
    earlier, records = done
    output = shutil.copytree(earlier, tmp_path / "out")
    (output / "runs" / "lora-seed0" / "records.json").unlink()
    (output / "runs" / "lora-seed0" / "notes").write_text("mine")

    def finetune(*args, **more):
        raise AssertionError

    monkeypatch.setattr(runs, "finetune", finetune)
    monkeypatch.setitem(sys.modules, "adapters", None)
    words = ["--methods", "full", "lora", "delta-lora", "--seeds", 2, "--start-step", 1]
    assert compare(bert, reviews, output, *words) == 0
    assert [r for r in records if r["note"] is None] == load(output)
    assert (output / "runs" / "lora-seed0" / "notes").read_text() == "mine"


@pytest.mark.parametrize("name", ["records.json", "result.json"])
def test_a_flipped_bit(name, done, bert, reviews, tmp_path, capsys):
    output = shutil.copytree(done[0], tmp_path / "out")
    path = output / "runs" / "lora-seed0" / name
    flip_a_bit(path, path.read_bytes().index(b"0."))
    words = ["--methods", "lora", "--seeds", 1, "--start-step", 1]
    assert compare(bert, reviews, output, *words) == 2
    error = capsys.readouterr().err
    assert f"{path}: got another checksum" in error and error.count("\n") == 1


def test_another_text_is_refused(done, bert, reviews, tmp_path, capsys):
    output = shutil.copytree(done[0], tmp_path / "out")
    other = tmp_path / "reviews.csv"
    shutil.copy(reviews, other)
    with other.open("a") as file:
        file.write("a fine film,fun\n")
    assert (
        compare(bert, str(other), output, "--methods", "lora", "--seeds", 1, "--start-step", 1) == 2
    )
    assert "data file reviews.csv had" in capsys.readouterr().err
