"""`compare --tune-lr`: which rates are chosen, by what, and which runs count as diverged."""

import csv

import pytest
import torch
from comparisons import FIXED, load
from tuned_comparisons import SKILLS, Finetune, result

from deltadiff.__main__ import main
from deltadiff.errors import ArgumentError, Interrupted
from deltadiff.finetune.compare import command, report, runs
from deltadiff.finetune.compare.cases import Arm, cases
from deltadiff.finetune.compare.learning_rates import best_rates, mark, outcomes, tuning_cases
from deltadiff.finetune.compare.runs import Run
from deltadiff.finetune.inputs import load_inputs
from deltadiff.finetune.tasks.spans import SpanTask

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")
WORDS = ["0.003", "0.01", "0.1", "--methods", *SKILLS, "--seeds", "2"]


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


@pytest.fixture
def finetune(monkeypatch):
    """Runs that are made up, so that they take no time."""
    made_up = Finetune()
    monkeypatch.setattr(runs, "finetune", made_up)
    for module in (runs, command):
        monkeypatch.setattr(module, "free_memory", lambda device: None)
    return made_up


@pytest.fixture
def no_figures(monkeypatch):
    monkeypatch.setattr(report, "plots", lambda *args: [])


def test_each_method_is_reported_at_its_own_best_rate(bert, texts, tmp_path, finetune):
    assert tuned(bert, texts, tmp_path / "out", *WORDS) == 0
    tuning, final = finetune.ran[:6], finetune.ran[6:]
    assert {(s.method, s.lr) for s in tuning} == {
        (m, lr) for m in SKILLS for lr in (0.003, 0.01, 0.1)
    }
    assert {(s.heldout, s.seed) for s in tuning} == {("0.2", 0)}  # the held-out file is not named
    assert [(s.method, s.seed, s.lr, s.heldout) for s in final] == [
        (method, seed, best, texts[1]) for seed in (0, 1) for method, (_, best) in SKILLS.items()
    ]

    records = load(tmp_path / "out")
    (nan,) = (
        r for r in records if (r.get("stage"), r["method"], r["lr"]) == ("tuning", "lora", 0.1)
    )
    assert nan["diverged"] and nan["value"] == 0.5  # that of a constant answer
    (r,) = (r for r in records if r["op"] == "compare_difference")
    assert (r["method"], r["control"], r["seeds"], r["examples"]) == ("delta-lora", "lora", 2, 40)
    assert (r["lr"], r["control_lr"]) == (0.003, 0.01)
    assert r["gain"] == pytest.approx(0.25) and 0 < r["low"] < 0.25 < r["high"]
    told = next((tmp_path / "out").glob("*.txt")).read_text()
    assert "0.950*" in told and "0.500 diverged" in told and "+0.2500" in told
    header, *rows = report.rates_table(records)
    assert [row[header.index("chosen at the edge")] for row in rows] == ["", "smallest"]
    assert list((tmp_path / "out").glob("*-differences.png"))


def test_it_goes_on_and_runs_nothing_twice(
    bert, texts, tmp_path, finetune, no_figures, monkeypatch
):
    ran = []

    def stopping(settings, **more):
        ran.append(settings.output)
        if len(ran) in (3, 9):
            raise Interrupted("checkpoint")
        return finetune(settings, **more)

    with monkeypatch.context() as patch:
        patch.setattr(runs, "finetune", stopping)
        codes = [tuned(bert, texts, tmp_path / "out", *WORDS) for _ in range(3)]
    assert codes == [130, 130, 0]
    assert len(ran) == 10 + 2 and len(set(ran)) == 10
    done = load(tmp_path / "out")
    finetune.ran.clear()
    assert tuned(bert, texts, tmp_path / "out", "0.02", *WORDS) == 0  # one more rate
    assert {(s.lr, s.heldout) for s in finetune.ran} == {(0.02, "0.2")}
    assert [r for r in load(tmp_path / "out") if r["lr"] != 0.02] == done


def test_the_time_is_up(bert, texts, tmp_path, finetune, no_figures, monkeypatch, capsys):
    clock = iter(range(1000))
    with monkeypatch.context() as patch:
        patch.setattr("time.monotonic", lambda: 60.0 * next(clock))
        assert tuned(bert, texts, tmp_path / "out", *WORDS, "--time-limit", "3") == 3
    assert "the time is up; the same command goes on" in capsys.readouterr().out
    assert 0 < len(finetune.ran) < 6
    assert tuned(bert, texts, tmp_path / "out", *WORDS) == 0
    assert len(finetune.ran) == 10


def test_the_rates_around_the_given_one(tmp_path):
    given = {"model": "m", "data": "d", "heldout": "h", "lr": 2e-4, "generate": 50}
    todo = cases(given, tmp_path, ["lora"], 2, ["lambda"], [0, 2], own=[("delta-lora", "lr", 1.0)])
    found = tuning_cases(todo, [], 0.3)
    rates: dict[Arm, list[float]] = {}
    for case in found:
        rates.setdefault(case.arm, []).append(case.settings.lr)
    assert rates[Arm("lora")] == [6e-5, 2e-4, 6e-4, 2e-3]
    assert rates[Arm("delta-lora", "lambda", 2.0)] == [0.3, 1.0, 3.0, 10.0]
    assert len(rates) == 5 and len({case.folder for case in found}) == 20
    assert {(s.settings.seed, s.settings.heldout, s.settings.generate) for s in found} == {
        (0, "0.3", 0)
    }


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


def test_a_run_without_the_metric_has_a_record_of_what_it_counts_with(tmp_path):
    given = {"model": "m", "data": "d", "heldout": "h", "regression": True, "label_column": "label"}
    (case, other) = cases(given, tmp_path, ["lora", "adalora"], 1)
    record = {"metric": "mse", "value": 1.0, "note": None}
    same, told = [[0.0, 0.5], [1.0, 0.5]], [[0.0, 0.1], [1.0, 0.8]]
    before = {"mse": 2.0}  # whose answers were all the same, too
    ran = {
        case: Run([dict(record)], result(case.settings, 1) | {"answers": same, "before": before}),
        other: Run([dict(record)], result(other.settings, 1) | {"answers": told, "before": before}),
    }
    found = outcomes(ran, "pearson")
    assert [found[c].diverged for c in (case, other)] == [True, False]
    mark(ran, found, "pearson")
    counted = [[(r["metric"], r["value"]) for r in ran[c].records] for c in (case, other)]
    assert counted == [[("mse", 1.0), ("pearson", 0.0)], [("mse", 1.0), ("pearson", 1.0)]]


def test_a_rate_that_could_not_be_tried_is_said(
    bert, texts, tmp_path, finetune, no_figures, monkeypatch
):
    def failing(settings, **more):
        if settings.lr == 0.01 and settings.heldout == "0.2":
            raise RuntimeError("no memory")
        return finetune(settings, **more)

    words = ["0.003", "0.01", "--methods", "lora", "--seeds", "1"]
    with monkeypatch.context() as patch:
        patch.setattr(runs, "finetune", failing)
        assert tuned(bert, texts, tmp_path / "out", *words) == 1
    assert (
        "LoRA: failed: RuntimeError: no memory"
        in next((tmp_path / "out").glob("*.txt")).read_text()
    )
    assert tuned(bert, texts, tmp_path / "out", *words) == 0  # it is tried again, and chosen
    assert {r["lr"] for r in load(tmp_path / "out") if r.get("stage") == "final"} == {0.01}


def test_answers_that_are_not_compared_one_by_one():
    with pytest.raises(ArgumentError, match="tune_lr: got text of the kind 'spans'"):
        command._metric(None, SpanTask(64))


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
def test_text_is_compared_by_its_loss_and_by_what_is_generated(llama, tmp_path):
    pytest.importorskip("sacrebleu")
    for name in ("train", "heldout"):
        lines = [
            f"{p} {w},the {w} film is {p}" for p in ("great", "dull") for w in ("story", "plot")
        ]
        (tmp_path / f"{name}.csv").write_text("\n".join(["prompt,text", *lines * 10]) + "\n")
    words = [
        "compare",
        llama,
        str(tmp_path / "train.csv"),
        "--heldout",
        str(tmp_path / "heldout.csv"),
    ]
    words += ["--prompt-column", "prompt", "--device", "cpu", "--steps", "20", "--generate", "4"]
    words += ["--tune-lr", "0.003", "0.03", "--methods", "lora", "delta-lora", "--seeds", "2"]
    words += ["--batch-size", "8", "--max-new-tokens", "6", "--start-step", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    records = load(tmp_path / "out")
    found = {r["metric"]: r for r in records if r["op"] == "compare_difference"}
    assert set(found) == {"nll_per_token", "bleu"}
    assert (found["nll_per_token"]["examples"], found["bleu"]["examples"]) == (40, 4)
    for metric, r in found.items():
        values = {
            method: [
                x["value"] for x in records
                if (x.get("stage"), x["metric"], x["method"]) == ("final", metric, method)
            ]
            for method in ("lora", "delta-lora")
        }  # fmt: skip
        means = [sum(mine) / 2 for mine in values.values()]
        assert [r["control_mean"], r["mean"]] == pytest.approx(means, rel=1e-4)
    assert not [r for r in records if r.get("stage") == "tuning" and r["metric"] == "bleu"]


@pytest.mark.long
def test_several_jobs_are_stopped_by_the_time_and_go_on(bert, texts, tmp_path):
    words = ["0.01", "0.03", "--methods", "lora", "bitfit", "--seeds", "2", "--jobs", "2"]
    assert tuned(bert, texts, tmp_path / "out", *words, "--time-limit", "0.0001") == 3
    assert not list((tmp_path / "out").glob("*.json"))
    assert tuned(bert, texts, tmp_path / "out", *words) == 0
    records = load(tmp_path / "out")
    assert {r["seconds"] for r in records if r.get("stage") == "final"} == {None}


@pytest.mark.gpu
@pytest.mark.long
def test_several_jobs_on_the_gpus(bert, texts, tmp_path):
    words = ["0.01", "0.03", "--methods", "lora", "delta-lora", "--seeds", "2", "--start-step", "1"]
    assert tuned(bert, texts, tmp_path / "out", *words, "--jobs", "2", "--device", "auto") == 0
    records = load(tmp_path / "out")
    assert {r["gpu"] for r in records} == {torch.cuda.get_device_name(0)}
    assert [r for r in records if r["op"] == "compare_difference"]
