"""`compare --tune-lr`: which rates are chosen, by what, and which runs count as diverged."""

import csv

import pytest
from comparisons import FIXED, load
from tuned_comparisons import SKILLS, Finetune, result

from deltadiff.__main__ import main
from deltadiff.errors import Interrupted
from deltadiff.finetune.compare import runs
from deltadiff.finetune.compare.cases import Arm, cases
from deltadiff.finetune.compare.learning_rates import best_rates, outcomes, tuning_cases
from deltadiff.finetune.compare.runs import Run
from deltadiff.finetune.inputs import load_inputs

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
METHODS = ["--methods", *SKILLS, "--seeds", "2", "--start-step", "1"]


@pytest.fixture(scope="module")
def texts(reviews, tmp_path_factory):
    """(training text, held-out text) as two files."""
    with open(reviews, newline="") as file:
        header, *rows = csv.reader(file)
    folder = tmp_path_factory.mktemp("texts")
    for name, part in (("train", rows[:300]), ("heldout", rows[300:])):
        with open(folder / f"{name}.csv", "w", newline="") as file:
            csv.writer(file).writerows([header, *part])
    return str(folder / "train.csv"), str(folder / "heldout.csv")


def tuned(bert, texts, output, *words) -> int:
    """The exit code of `deltadiff compare --tune-lr`."""
    train, heldout = texts
    fixed = ["compare", bert, train, "--heldout", heldout, "--output", str(output), *FIXED]
    return main([*fixed, "--tune-lr", *map(str, words)])


def test_each_method_is_reported_at_its_own_best_rate(bert, texts, tmp_path, monkeypatch):
    finetune = Finetune()
    monkeypatch.setattr(runs, "finetune", finetune)
    assert tuned(bert, texts, tmp_path / "out", *METHODS) == 0
    tuning, final = finetune.ran[:12], finetune.ran[12:]
    grid = {0.003, 0.01, 0.03, 0.1}
    assert {
        s.method: {t.lr for t in tuning if t.method == s.method} for s in tuning
    } == dict.fromkeys(SKILLS, grid)
    assert {(s.heldout, s.seed) for s in tuning} == {("0.2", 0)}  # the held-out file is not named
    assert {(s.method, s.seed): s.lr for s in final} == {
        (method, seed): best for method, (_, best) in SKILLS.items() for seed in (0, 1)
    }
    assert {s.heldout for s in final} == {texts[1]}

    records = load(tmp_path / "out")
    nan = [
        r for r in records if (r.get("stage"), r["method"], r.get("lr")) == ("tuning", "lora", 0.1)
    ]
    assert [r["diverged"] for r in nan] == [True] and nan[0]["value"] == 0.5  # a constant answer
    difference = {
        (r["method"], r["control"]): r for r in records if r["op"] == "compare_difference"
    }
    assert set(difference) == {
        ("delta-lora", "lora-alpha-control"), ("delta-lora", "lora"),
        ("lora-alpha-control", "lora"),
    }  # fmt: skip
    r = difference["delta-lora", "lora"]
    assert r["gain"] == pytest.approx(0.25) and 0 < r["low"] < 0.25 < r["high"]
    assert (r["lr"], r["control_lr"], r["seeds"], r["examples"]) == (0.003, 0.01, 2, 40)
    told = next((tmp_path / "out").glob("*.txt")).read_text()
    assert "0.950*" in told and "0.500 diverged" in told and "+0.2500" in told
    assert list((tmp_path / "out").glob("*-differences.png"))


def test_it_goes_on_and_runs_nothing_twice(bert, texts, tmp_path, monkeypatch, capsys):
    real, ran = Finetune(), []

    def finetune(settings, **more):
        ran.append(settings.output)
        if len(ran) in (5, 16):
            raise Interrupted("checkpoint")
        return real(settings, **more)

    monkeypatch.setattr(runs, "finetune", finetune)
    codes = [tuned(bert, texts, tmp_path / "out", *METHODS) for _ in range(4)]
    assert codes == [130, 130, 0, 0]
    assert len(ran) == 12 + 6 + 2 and len(set(ran)) == 18
    whole = tmp_path / "whole"
    monkeypatch.setattr(runs, "finetune", Finetune())
    assert tuned(bert, texts, whole, *METHODS) == 0
    assert load(whole) == load(tmp_path / "out")
    assert tuned(bert, texts, whole, "0.01", "0.02", *METHODS) == 0  # of other rates as well


def test_the_time_is_up(bert, texts, tmp_path, monkeypatch, capsys):
    finetune, clock = Finetune(), iter(range(1000))
    monkeypatch.setattr(runs, "finetune", finetune)
    monkeypatch.setattr("time.monotonic", lambda: 60.0 * next(clock))
    words = [*METHODS, "--time-limit", "5"]
    assert tuned(bert, texts, tmp_path / "out", *words) == 3
    assert "the time is up; the same command goes on" in capsys.readouterr().out
    assert 0 < len(finetune.ran) < 12
    done = len(finetune.ran)
    monkeypatch.undo()
    monkeypatch.setattr(runs, "finetune", finetune)
    assert tuned(bert, texts, tmp_path / "out", *METHODS) == 0
    assert len(finetune.ran) == 18 and done < 18


def test_a_run_of_the_choice_does_not_need_the_heldout_text(bert, texts, tmp_path):
    """Not even the file: it reports on a part of the training text, which it does not learn."""
    train, heldout = texts
    given = {"model": bert, "data": train, "heldout": str(tmp_path / "gone.csv"), "device": "cpu"}
    given |= {"label_column": "label"}
    todo = cases(given, tmp_path, ["lora"], seeds=2)
    (case, other) = tuning_cases(todo, [0.1, 0.2], 0.2)
    inputs = load_inputs(case.settings)
    places = [{e.place for e in part.examples} for part in (inputs.train, inputs.heldout)]
    assert len(places[0]) == 240 and len(places[1]) == 60 and not places[0] & places[1]
    assert all(place.startswith(train) for place in places[0] | places[1])
    again = load_inputs(other.settings)  # each rate is judged by the same examples
    assert [e.place for e in again.heldout.examples] == [e.place for e in inputs.heldout.examples]


def _run(case, share, **more) -> Run:
    return Run([{"note": None}], result(case.settings, share) | more)


def test_what_counts_as_diverged(tmp_path):
    given = {"model": "m", "data": "d", "heldout": "h"}
    tuning = tuning_cases(cases(given, tmp_path, ["lora"], 1), [1e-4, 1e-3, 1e-2, 1e-1], 0.2)
    notes = [None, None, None, f"{runs.DIVERGED}: the loss is nan at step 3"]
    ran = {
        tuning[0]: _run(tuning[0], 0.6, before={"accuracy": 0.62}),  # no better than before
        tuning[1]: _run(tuning[1], 0.5),  # no better than a constant answer
        tuning[2]: _run(tuning[2], 0.55),
        tuning[3]: Run([{"note": notes[3]}], None),
    }
    found = outcomes(ran, "accuracy")
    assert [found[case].diverged for case in tuning] == [True, True, False, True]
    assert found[tuning[3]].value == 0.5
    # One that diverged is not chosen, although its figure is higher.
    assert best_rates(found, "accuracy") == {Arm("lora"): 1e-2}
    del found[tuning[2]]
    assert best_rates(found, "accuracy") == {Arm("lora"): 1e-4}
    equal = {case: found[tuning[0]] for case in reversed(tuning)}
    assert best_rates(equal, "accuracy") == {Arm("lora"): 1e-4}  # the smaller rate


def test_a_method_that_cannot_run_has_no_rate(tmp_path):
    given = {"model": "m", "data": "d", "heldout": "h"}
    tuning = tuning_cases(cases(given, tmp_path, ["lora", "houlsby"], 1), [1e-3, 1e-2], 0.2)
    ran = {case: _run(case, 0.8) for case in tuning if case.settings.method == "lora"}
    ran |= {c: Run([{"note": "cannot run"}], None) for c in tuning if c not in ran}
    found = outcomes(ran, "accuracy")
    assert set(best_rates(found, "accuracy")) == {Arm("lora")}
    assert outcomes({c: r for c, r in ran.items() if r.result is None}, "accuracy") == {}


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--heldout", "0.1"], "heldout: got 0.1, a share of the text"),
        (["--heldout", "{train}"], "which is the training text"),
        (["--tune-lr", "0.1"], "tune_lr: got [0.1]"),
        (["--tune-lr", "0.1", "0.1"], "tune_lr: got [0.1, 0.1]"),
        (["--tune-lr", "0.1", "-1"], "lr: got -1.0"),
        (["--tune-lr", "0.1", "nan"], "lr: got nan"),
        (["--tune-lr", "0.1", "0.2", "--set", "lora.lr=3"], "set: got lr beside rates"),
        (["--tune-share", "1"], "tune_share: got 1.0"),
        (["--tune-share", "0"], "tune_share: got 0.0"),
        (["--metric", "bleu"], "metric: got 'bleu'"),
        (["--metric", "pearson"], "accepted: accuracy or matthews or loss, for this text"),
        (["--time-limit", "0"], "time_limit: got 0.0"),
        (["--time-limit", "nan"], "time_limit: got nan"),
    ],
)
def test_bad_input(words, told, bert, texts, tmp_path, capsys):
    words = [word.format(train=texts[0]) for word in words]
    assert tuned(bert, texts, tmp_path / "out", "--methods", "lora", *words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("word", ["--metric accuracy", "--tune-share 0.5"])
def test_options_that_mean_nothing_without_it(word, bert, reviews, tmp_path, capsys):
    words = ["compare", bert, reviews, "--output", str(tmp_path / "out"), *FIXED, *word.split()]
    assert main(words) == 2
    assert "none without --tune-lr" in capsys.readouterr().err


def test_each_worker_sees_one_gpu_in_turn():
    visible = {"CUDA_VISIBLE_DEVICES": "3,GPU-5"}
    found = [runs.one_gpu(place, visible)["CUDA_VISIBLE_DEVICES"] for place in range(3)]
    assert found == ["3", "GPU-5", "3"]
    for one in ("", "2"):
        assert runs.one_gpu(1, {"CUDA_VISIBLE_DEVICES": one}) == {}


@pytest.mark.long
def test_the_heldout_labels_do_not_change_the_choice(bert, texts, tmp_path):
    """The whole comparison, on held-out text whose labels are all turned round."""
    train, heldout = texts
    turned = tmp_path / "heldout.csv"
    text = (
        open(heldout).read().replace(",fun", ",x").replace(",dull", ",fun").replace(",x", ",dull")
    )
    turned.write_text(text)
    words = ["0.003", "0.03", "--methods", "lora", "delta-lora", "--seeds", "2", "--start-step", 1]
    found = []
    for name, file in (("one", heldout), ("other", turned)):
        assert tuned(bert, (train, str(file)), tmp_path / name, *words, "--task", "t") == 0
        records = load(tmp_path / name)
        tuning = [r for r in records if r.get("stage") == "tuning"]
        final = [r for r in records if r.get("stage") == "final" and r["metric"] == "accuracy"]
        found.append(([(r["method"], r["lr"], r["metric"], r["value"]) for r in tuning],
                      [(r["method"], r["lr"]) for r in final]))  # fmt: skip
        shares = {(r["method"], r["seed"]): r["value"] for r in final}
        found[-1] += (shares,)
    assert found[0][:2] == found[1][:2]
    for key, share in found[0][2].items():
        assert share == pytest.approx(1 - found[1][2][key])


@pytest.mark.long
def test_several_jobs_are_stopped_by_the_time_and_go_on(bert, texts, tmp_path):
    words = ["0.01", "0.03", "--methods", "lora", "bitfit", "--seeds", "2", "--jobs", "2"]
    assert tuned(bert, texts, tmp_path / "out", *words, "--time-limit", "0.0001") == 3
    assert not list((tmp_path / "out").glob("*.json"))
    assert tuned(bert, texts, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["seconds"] for r in records if r.get("stage") == "final"} == {None}
