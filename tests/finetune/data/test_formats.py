"""Each format of text files gives the same examples, or says what is wrong with a file."""

import bz2
import json

import pytest
from finetune_runs import asked, squad

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples

ROWS = [("a fine, quiet film", "good"), ('so "dull"', "bad"), ("été\tà Paris", "good")]

BOTH = Layout("text", "label")


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
    found = read_examples(str(tmp_path / "a.tsv"), Layout("3", "1"))
    assert found == [Example("A text.", "1"), Example("Another.", "0")]


@pytest.mark.parametrize(
    ("name", "content", "told"),
    [
        ("a.csv", b"body,label\nx,y\n", "text_column: got 'text', which {file}, line 2 lacks"),
        ("a.csv", b"", "data: got {file}, which holds no examples"),
        ("a.csv.bz2", b"no bz2", "data: got {file}: Invalid data stream; accepted: a readable"),
        ("a.txt.gz", b"no gzip", "data: got {file}: Not a gzipped file"),
        ("a.txt.xz", b"no xz", "data: got {file}: Input format not supported"),
        ("a.xml", b"<a/>", "data: got {file}, a file ending in 'xml'"),
        ("missing", None, "data: got {file}, no such file"),
    ],
)
def test_a_file_that_cannot_be_used(tmp_path, name, content, told):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ArgumentError) as caught:
        read_examples(str(path), BOTH)
    assert told.format(file=path) in str(caught.value)


def test_a_label_and_a_text_on_each_line(tmp_path):
    (tmp_path / "sst2.train").write_text("1 a  fine film\n\n0 dull\n")
    path = str(tmp_path / "sst2.train")
    expected = [Example("a  fine film", "1"), Example("dull", "0")]
    assert read_examples(path, Layout(label="label", format="label-text")) == expected
    without = [Example(e.text) for e in expected]
    assert read_examples(path, Layout(format="label-text")) == without
    with pytest.raises(ArgumentError, match="--format"):
        read_examples(path)


def test_a_line_without_text(tmp_path):
    (tmp_path / "a.txt").write_text("1 fine\n0\n")
    with pytest.raises(ArgumentError, match="a.txt, line 2: 0"):
        read_examples(str(tmp_path / "a.txt"), Layout(label="label", format="label-text"))


def test_squads_files_are_read(tmp_path):
    questions = [
        asked("what is it", "the film is great", "great", "is great"),
        asked("who", "nobody knows"),
    ]
    empty = asked("who", " ")
    for name, format in (("train-v2.0.json", None), ("a.txt", "squad")):
        (tmp_path / name).write_text(squad(empty, *questions))
        assert read_examples(str(tmp_path / name), Layout(format=format)) == questions


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            squad(Example("a film", prompt="q", answers=(("film", 1),))),
            "question '0': 'film', which is not at 1",
        ),
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
        read_examples(str(tmp_path / "a.json"), Layout(format="squad"))
    assert told in str(caught.value)
