"""Tokenizers that do not belong to their model, and texts that are too long for it."""

import shutil
from pathlib import Path

import pytest
from finetune_runs import finetune

transformers = pytest.importorskip("transformers")
pytest.importorskip("tqdm")
pytest.importorskip("matplotlib")
pytest_plugins = ["tiny_models"]

from deltadiff.finetune.token_checks import most_tokens  # noqa: E402


@pytest.fixture
def copied(bert, llama, tmp_path):
    """A function that copies a model, for a test to change it."""

    def copy(name: str):
        folder = tmp_path / "model"
        shutil.copytree({"bert": bert, "llama": llama}[name], folder)
        return folder

    return copy


def told(capsys, tmp_path, model, data, *words) -> str:
    """What `deltadiff finetune` says about an input that cannot be used."""
    assert finetune(model, data, *words, "--device", "cpu", "--output", tmp_path / "out") == 2
    assert not (tmp_path / "out").exists()
    return capsys.readouterr().err


def without_tokenizer(folder):
    for path in folder.glob("tokenizer*"):
        path.unlink()


def test_no_tokenizer(copied, reviews, tmp_path, capsys):
    """transformers makes one of nothing for BERT, for which every word is unknown."""
    folder = copied("bert")
    without_tokenizer(folder)
    text = told(capsys, tmp_path, folder, reviews, "--label-column", "label")
    assert f"model: got {folder}, which has no tokenizer" in text


def test_a_tokenizer_that_knows_no_word_of_the_text(bert, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n" + "один,a\nдва,b\n" * 20)
    text = told(capsys, tmp_path, bert, tmp_path / "a.csv", "--label-column", "label")
    assert "model: got a tokenizer for which all of the text is unknown ([UNK])" in text


def test_the_share_of_unknown_tokens_is_said(bert, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n" + "a film,a\nthe фильм,b\n" * 20)
    words = ["--label-column", "label", "--output", tmp_path / "out", "--steps", "1"]
    assert finetune(bert, tmp_path / "a.csv", *words, "--heldout", tmp_path / "a.csv") == 0
    assert (
        "25.0% of the tokens of training texts are unknown to the tokenizer"
        in capsys.readouterr().out
    )


def test_a_tokenizer_that_is_larger_than_the_embedding(copied, reviews, tmp_path, capsys):
    folder = copied("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.add_tokens(["film"])
    tokenizer.backend_tokenizer.add_tokens([f"word{i}" for i in range(3)] + ["cast plot"])
    tokenizer.save_pretrained(folder)
    (tmp_path / "a.txt").write_text("a film\nword2 is very great\n" * 20)
    text = told(capsys, tmp_path, folder, tmp_path / "a.txt")
    assert "which is" not in text and "for an embedding of 23 tokens" in text


def test_a_tokenizer_that_can_pad_with_nothing(copied, reviews, tmp_path, capsys):
    folder = copied("llama")
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = tokenizer.eos_token = None
    tokenizer.save_pretrained(folder)
    text = told(capsys, tmp_path, folder, reviews)
    assert "has neither a padding token nor an end token" in text


def test_texts_longer_than_the_positions(bert, tmp_path, capsys):
    (tmp_path / "a.csv").write_text("text,label\n" + f"{'film ' * 70},a\nplot,b\n" * 20)
    words = [bert, tmp_path / "a.csv", "--label-column", "label"]
    text = told(capsys, tmp_path, *words)
    assert "max_length: got 128; a text has 70 tokens; accepted: at most 64, the positions" in text


def test_no_positions_for_a_completion(tmp_path, bert, capsys):
    config = transformers.GPT2Config(
        vocab_size=23,
        n_embd=16,
        n_layer=1,
        n_head=2,
        n_positions=20,
        bos_token_id=0,
        eos_token_id=2,
    )
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "model")
    for path in Path(bert).glob("tokenizer*"):
        shutil.copy(path, tmp_path / "model")
    (tmp_path / "a.csv").write_text("prompt,text\n" + "a film is,great\n" * 20)
    words = ["--prompt-column", "prompt", "--generate", "1", "--max-new-tokens", "18"]
    text = told(capsys, tmp_path, tmp_path / "model", tmp_path / "a.csv", *words)
    assert "max_new_tokens: got 18; a prompt has 3 tokens; accepted: a completion within" in text


def test_the_positions_of_models():
    def small(name, **more):
        config = getattr(transformers, f"{name}Config")(
            vocab_size=30, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, **more
        )
        return getattr(transformers, f"{name}Model")(config)

    assert most_tokens(small("Bert", max_position_embeddings=20)) == 20
    assert most_tokens(small("Roberta", max_position_embeddings=20, pad_token_id=1)) == 18
    assert most_tokens(small("OPT", max_position_embeddings=20, word_embed_proj_dim=16)) == 20
    assert most_tokens(small("GPT2", n_positions=20)) == 20
    assert most_tokens(small("Llama", max_position_embeddings=20)) is None
