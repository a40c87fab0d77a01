"""Fixtures for the tests of fine-tuning: tiny random models, and texts that they can learn."""

import random
from pathlib import Path

import pytest
import torch
from threads import single_thread

transformers = pytest.importorskip("transformers")
FUN = ["great", "fine", "clever", "warm", "bright"]
DULL = ["dull", "flat", "stale", "weak", "tired"]
NEUTRAL = ["the", "film", "is", "a", "story", "with", "plot", "and", "cast", "very"]


@pytest.fixture(scope="module")
def one_thread():
    """The tests of a module run on one thread."""
    with single_thread():
        yield


def save_tokenizer(folder: Path) -> None:
    """Save a tokenizer whose tokens are the words above."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = ["[PAD]", "[UNK]", "[END]", *FUN, *DULL, *NEUTRAL]
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(words)}, "[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="[PAD]", unk_token="[UNK]", eos_token="[END]"
    ).save_pretrained(folder)


SIZES = {"vocab_size": 23, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}


@pytest.fixture(scope="session")
def bert(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bert")
    config = transformers.BertConfig(
        **SIZES, num_attention_heads=2, max_position_embeddings=64, initializer_range=0.2
    )
    transformers.BertModel(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def llama(tmp_path_factory) -> str:
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("llama")
    config = transformers.LlamaConfig(
        **SIZES, num_attention_heads=4, num_key_value_heads=2, initializer_range=0.2,
        pad_token_id=0, eos_token_id=2, bos_token_id=None,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    save_tokenizer(folder)
    return str(folder)


@pytest.fixture(scope="session")
def reviews(tmp_path_factory) -> str:
    """A CSV file of texts, labelled by the word of praise or blame that stands in each."""
    draw = random.Random(0)
    lines = ["text,label"]
    for _ in range(400):
        label = draw.choice(["fun", "dull"])
        words = draw.choices(NEUTRAL, k=draw.randint(2, 9))
        words.insert(draw.randint(0, len(words)), draw.choice(FUN if label == "fun" else DULL))
        lines.append(f"{' '.join(words)},{label}")
    path = tmp_path_factory.mktemp("data") / "reviews.csv"
    path.write_text("\n".join(lines) + "\n")
    return str(path)
