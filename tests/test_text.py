"""Tables as text."""

import pytest

from deltadiff.text import align_columns, markdown_table


def test_columns_are_in_line_without_spaces_at_the_end():
    rows = [("name", "count"), ("a", "1"), ("longer", "23")]
    assert align_columns(rows) == "name    count\na       1\nlonger  23"
    assert align_columns(rows, right=(1,)) == "name    count\na           1\nlonger     23"


def test_rows_of_other_lengths_are_refused():
    with pytest.raises(ValueError):
        align_columns([("a", "b"), ("c",)])


def test_markdown():
    assert markdown_table(["a", "b"], ["1", "2"]) == "| a | b |\n| --- | --- |\n| 1 | 2 |"
