"""Each format of text files gives the same examples, or says what is wrong with a file."""

import bz2
import json

import pytest
from finetune_runs import asked, squad

from deltadiff.errors import ArgumentError
from deltadiff.finetune.examples import Example
from deltadiff.finetune.formats import Columns
from deltadiff.finetune.reading import read_examples

ROWS = [("a fine, quiet film", "good"), ('so "dull"', "bad"), ("été\tà Paris", "good")]

BOTH = Columns("text", "label")


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


def test_each_line_of_plain_text_is_an_example(tmp_path):
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


def test_squads_files_are_read(tmp_path):
    questions = [
        asked("what is it", "the film is great", "great", "is great"),
        asked("who", "nobody knows"),
    ]
    empty = asked("who", " ")
    for name, format in (("train-v2.0.json", None), ("a.txt", "squad")):
        (tmp_path / name).write_text(squad(empty, *questions))
        assert read_examples(str(tmp_path / name), format=format) == questions


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (squad(Example("a film", prompt="q", answers=(("film", 1),))), "'film', which is not at 1"),
        (squad(Example("a film", prompt="q", answers=(("", 0),))), "'', which is not at 0"),
        ('{"data": [{"paragraphs": [{"context": "x"}]}]}', "KeyError"),
        ('{"data": 3}', "TypeError"),
        ("[1]", "TypeError"),
        ("{", "Expecting"),
        ('{"data": []}', "which holds no examples"),
    ],
)
def test_files_that_are_not_squads(text, told, tmp_path):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ArgumentError, match="data: got") as caught:
        read_examples(str(tmp_path / "a.json"))
    assert told in str(caught.value)
