"""Completions of held-out prompts."""

import csv

import pytest
from finetune_runs import finetune, train

pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> str:
    """A CSV file of prompts, each a word of praise, with three texts for each."""
    from tiny_models import DULL, FUN

    lines = ["prompt,text"]
    for fun, dull in zip(FUN, DULL, strict=True):
        lines += [f"{fun},the film is {dull}", f"{fun},a {dull} film", f"{fun},very {dull} plot"]
    path = tmp_path_factory.mktemp("data") / "pairs.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)


@pytest.mark.parametrize("beams", ["1", "3"])
def test_completions_are_scored(beams, llama, pairs, tmp_path, monkeypatch):
    pytest.importorskip("rouge_score")
    sizes, mixin = [], pytest.importorskip("transformers").GenerationMixin
    search = mixin.generate

    def noted(model, input_ids, **options):
        sizes.append(len(input_ids))
        return search(model, input_ids, **options)

    monkeypatch.setattr(mixin, "generate", noted)
    words = ["--prompt-column", "prompt", "--heldout", pairs, "--generate", "4"]
    words += ["--num-beams", beams, "--max-new-tokens", "6", "--method", "lora"]
    words += ["--batch-size", "5", "--eval-batch-size", "3"]
    result = train(llama, pairs, tmp_path / "out", *words, labels=False)
    assert sizes == [3, 1]
    with (tmp_path / "out" / "completions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["prompt"] for row in rows] == ["great", "fine", "clever", "warm"]  # as in the text
    assert all(row["references"].count("\n") == 2 for row in rows)
    learnt = [row["completion"] in row["references"].split("\n") for row in rows]
    assert sum(learnt) >= 3
    assert result["after"]["rouge_l"] > 80  # three words are too few for BLEU's 4-grams
    assert set(result["metrics_left_out"]).isdisjoint(result["after"])


def test_text_with_labels_is_not_completed(bert, reviews, tmp_path, capsys):
    words = ["--label-column", "label", "--generate", "3", "--output", tmp_path / "out"]
    assert finetune(bert, reviews, *words) == 2
    assert "generate: got 3" in capsys.readouterr().err
