"""Input that `deltadiff compare` cannot use."""

import pytest
from comparisons import compare

from deltadiff.__main__ import main

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


def test_other_settings_are_not_mixed_in(done, bert, reviews, capsys):
    output, _ = done
    code = compare(bert, reviews, output, "--methods", "lora", "--seeds", 1, "--start-step", 2)
    assert code == 2
    told = capsys.readouterr().err
    assert "where start_step was 1 and not 2" in told and told.count("\n") == 1


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
    assert compare(bert, reviews, tmp_path / "out", *words) == 2
    err = capsys.readouterr().err
    assert told in err and err.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_without_model_or_data(capsys):
    assert main(["compare"]) == 2
    assert "model: got nothing" in capsys.readouterr().err
