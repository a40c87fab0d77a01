"""Input that `deltadiff finetune` cannot use: one line on stderr, and nothing is left behind."""

import pytest
from finetune_runs import finetune

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.mark.parametrize(
    ("words", "told"),
    [
        ([], "model: got nothing"),
        (["{bert}"], "data: got nothing"),
        (["no_such", "{data}"], "model: got 'no_such'"),
        (["{bert}", "no_such.csv"], "data: got no_such.csv"),
        (["{bert}", "{data}"], "for text generation"),
        (["{bert}", "{data}", "--label-column", "stars"], "label_column: got 'stars'"),
        (["{bert}", "{data}", "--text-column", "body"], "text_column: got 'body'"),
        (["{bert}", "{data}", "--label-column", "text"], "classes of the training text"),
        (["{bert}", "{data}", "--label-column", "label", "--target-modules", "qury"], "query"),
        (["{bert}", "{data}", "--label-column", "label", "--r", "0"], "r: got 0"),
        (["{bert}", "{data}", "--label-column", "label", "--r", "999"], "r: got 999"),
        (["{bert}", "{data}", "--label-column", "label", "--alpha", "-1"], "lora_alpha: got -1"),
        (["{bert}", "{data}", "--label-column", "label", "--lr", "nan"], "lr: got nan"),
        (
            ["{bert}", "{data}", "--label-column", "label", "--start-step", "-1"],
            "start_step: got -1",
        ),
        (["{bert}", "{data}", "--update-ratio", "-2", "--label-column", "label"], "update_ratio"),
        (["{bert}", "{data}", "--steps", "0"], "steps: got 0"),
        (["{bert}", "{data}", "--batch-size", "0"], "batch_size: got 0"),
        (["{bert}", "{data}", "--eval-batch-size", "0"], "eval_batch_size: got 0"),
        (["{bert}", "{data}", "--heldout", "1.5"], "heldout: got 1.5"),
        (["{bert}", "{data}", "--heldout", "no.csv"], "no.csv"),
        (["{bert}", "{data}", "--device", "cuda:99"], "device: got 'cuda:99'"),
        (["{bert}", "{data}", "--eager", "--method", "delta-lora"], "eager: got"),
        (["{bert}", "{data}", "--output", "{full}"], "a new folder"),
        (["--resume", "{full}"], "settings.json"),
        (["{bert}", "{data}", "--resume", "{full}"], "--resume OUTPUT alone"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(words, told, bert, reviews, tmp_path, capsys):
    full = tmp_path / "full"
    full.mkdir()
    (full / "a file").touch()
    words = [w.format(bert=bert, data=reviews, full=full) for w in words]
    if "--output" not in words and "--resume" not in words:
        words += ["--output", str(tmp_path / "out")]
    assert finetune(*words) == 2
    told_here = capsys.readouterr().err
    assert told in told_here
    assert told_here.startswith("deltadiff finetune: ") and told_here.count("\n") == 1
    assert [p.name for p in tmp_path.rglob("*")] == ["full", "a file"]


@pytest.mark.parametrize("words", [["--steps", "many"], ["--method", "dora"], ["--no-such"]])
def test_options_that_do_not_parse(words, bert, reviews):
    with pytest.raises(SystemExit) as caught:
        finetune(bert, reviews, *words)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--epochs", "0"], "epochs: got 0"),
        (["--epochs", "1", "--steps", "3"], "epochs: got 1.0 beside steps 3"),
        (["--warmup-ratio", "1"], "warmup_ratio: got 1"),
        (["--weight-decay", "-1"], "weight_decay: got -1"),
        (["--label-smoothing", "1"], "label_smoothing: got 1"),
        (["--generate", "-2"], "generate: got -2"),
        (["--num-beams", "0"], "num_beams: got 0"),
        (["--regression", "--label-column", "none"], "regression: got no label column"),
        (["--regression"], "label_column: got"),
        (["--preset", "delta-lora/none"], "preset: got 'delta-lora/none'"),
        (["--lora-dropout", "1", "--method", "lora"], "lora_dropout: got 1"),
    ],
)
def test_training_options_that_cannot_be_used(words, told, bert, reviews, tmp_path, capsys):
    fixed = [] if "--label-column" in words else ["--label-column", "label"]
    assert finetune(bert, reviews, *fixed, *words, "--output", tmp_path / "out") == 2
    assert told in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
