"""CSV and TSV: every delimiter, and rows whose cells would shift into other columns."""

import csv

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.data.skipped import Skipped

BOTH = Layout("text", "label")


def read(tmp_path, text: str, layout: Layout = BOTH, name: str = "a.csv"):
    """(examples, what was skipped)."""
    (tmp_path / name).write_text(text)
    skipped = Skipped()
    return read_examples(str(tmp_path / name), layout, skipped), skipped


@pytest.mark.parametrize("delimiter", [",", ";", "\t", "|"])
def test_the_header_shows_the_delimiter(delimiter, tmp_path):
    rows = [["id, n", "text", "label"], ["1", 'a, "b"; c|d\te', "x"], ["2", "f\ng", "y"]]
    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file, delimiter=delimiter).writerows(rows)
    found = read_examples(str(tmp_path / "a.csv"), BOTH)
    assert found == [Example('a, "b"; c|d\te', "x"), Example("f\ng", "y")]
    assert [e.place.rpartition(", ")[2] for e in found] == ["line 2", "line 3"]


def test_the_widest_header_counts_where_no_column_is_named(tmp_path):
    assert read(tmp_path, "n;text\n1;a, b\n", Layout())[0] == [Example("a, b")]


@pytest.mark.parametrize(("given", "character"), [("^", "^"), ("tab", "\t"), (" ", " ")])
def test_another_delimiter_is_given(given, character, tmp_path):
    text = f"text{character}label\na,b{character}x\n"
    layout = Layout("text", "label", delimiter=given)
    assert read(tmp_path, text, layout)[0] == [Example("a,b", "x")]


@pytest.mark.parametrize("delimiter", ["", ",,", '"', "\n"])
def test_what_cannot_be_a_delimiter(delimiter, tmp_path):
    with pytest.raises(ArgumentError, match="delimiter: got"):
        read(tmp_path, "text\na\n", Layout(delimiter=delimiter))


def test_a_delimiter_of_another_format(tmp_path):
    with pytest.raises(ArgumentError, match="delimiter: got ';' for .*a.tsv, which is tsv"):
        read(tmp_path, "text\na\n", Layout(delimiter=";"), "a.tsv")


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("text,label\na, b,x\n", "line 2: 3 cells for 2 columns; cell 3 ('x') is beyond the last"),
        ("text,label\na,x\nonly\n", "line 3: 1 cells for 2 columns; column 'label' is missing"),
        ('text,label\n"a\nb",x\nc,y,\n', "line 4: 3 cells for 2 columns"),
        ('text,label\na,x\n"b,y\n', "line 3: unexpected end of data"),
        ('text,label\n"a" b,y\n', "line 2: ',' expected after '\"'"),
        ("text,text\na,b\n", "line 1: 2 columns 'text'"),
    ],
)
def test_rows_that_would_be_read_wrongly(text, told, tmp_path):
    with pytest.raises(ArgumentError) as caught:
        read(tmp_path, text)
    assert f"data: got {tmp_path / 'a.csv'}, {told}" in str(caught.value)


@pytest.mark.parametrize("line", ["a\tx\ty", "a"])
def test_ragged_rows_of_tsv(line, tmp_path):
    with pytest.raises(ArgumentError, match="line 3: . cells for 2 columns"):
        read(tmp_path, f"text\tlabel\nb\tz\n{line}\n", BOTH, "a.tsv")
    with pytest.raises(ArgumentError, match="line 2: . cells for 2 columns"):
        read(tmp_path, f"b\tz\n{line}\n", Layout("0", "1"), "a.tsv")


def test_space_around_names_and_labels_does_not_count(tmp_path):
    assert read(tmp_path, "text , label\n a , b\nc,b\n")[0] == [
        Example("a", "b"),
        Example("c", "b"),
    ]


def test_what_is_missing_is_skipped_and_counted(tmp_path):
    found, skipped = read(tmp_path, "text,label\n\na,x\n  \nb,\n,y\n\n c , \n d,y\n")
    assert found == [Example("a", "x"), Example("d", "y")]
    assert skipped.counts == {"blank": 3, "without a label": 2, "without text": 1}
    path = tmp_path / "a.csv"
    assert f"2 without a label (first: {path}, line 5)" in str(skipped)


def test_a_file_in_which_all_is_missing(tmp_path):
    with pytest.raises(ArgumentError, match="no examples; skipped: 2 without a label"):
        read(tmp_path, "text,label\na,\nb,\n")


def test_long_cells(tmp_path):
    limit = csv.field_size_limit()
    text = "a" * (limit + 1)
    assert read(tmp_path, f"text,label\n{text},x\n")[0] == [Example(text, "x")]
    assert csv.field_size_limit() == limit
