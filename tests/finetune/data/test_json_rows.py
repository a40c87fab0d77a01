"""JSON: lines and arrays give the same examples, and what is wrong has its line."""

import json

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.data.skipped import Skipped

BOTH = Layout("text", "label")
ROWS = [
    {"text": "a [1], ]", "label": 1},
    {"text": "b\n", "label": True},
    {"text": 7, "label": " c"},
]
EXPECTED = [Example("a [1], ]", "1"), Example("b", "true"), Example("7", "c")]
WRITTEN = {
    "lines": "\n\n".join(map(json.dumps, ROWS)),
    "array": json.dumps(ROWS),
    "pretty array": f"\n {json.dumps(ROWS, indent=2)}\n",
}


@pytest.mark.parametrize("written", WRITTEN)
def test_json_is_lines_or_an_array(written, tmp_path):
    (tmp_path / "a.json").write_text(WRITTEN[written])
    found = read_examples(str(tmp_path / "a.json"), BOTH)
    assert found == EXPECTED
    lines = [int(e.place.rpartition(" ")[2]) for e in found]
    assert lines == {"lines": [1, 3, 5], "array": [1, 1, 1], "pretty array": [3, 7, 11]}[written]


@pytest.mark.parametrize("empty", [None, "", " ", float("nan")])
def test_null_is_missing_and_no_class(empty, tmp_path):
    rows = [
        {"text": "a", "label": "x"},
        {"text": "b", "label": empty},
        {"text": empty, "label": "x"},
    ]
    rows += [{"text": "null", "label": "None"}, {"text": "c"}, {"label": "x"}]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    skipped = Skipped()
    found = read_examples(str(tmp_path / "a.jsonl"), BOTH, skipped)
    assert found == [Example("a", "x"), Example("null", "None")]
    assert skipped.counts == {"without a label": 2, "without text": 2}


@pytest.mark.parametrize(
    ("name", "text", "told"),
    [
        ("a.jsonl", '{"text": "x", "label": "y"}\n{"text"\n', "line 2, character 8: Expecting"),
        ("a.jsonl", "[1]\n", "line 1: [1]; accepted: a JSON object for each example"),
        ("a.jsonl", '{"text": "x"}\n', "label_column: got 'label', which"),
        ("a.jsonl", '{"text": ["x"], "label": 1}', "line 1, column 'text': ['x'], no text"),
        (
            "a.jsonl",
            '{"text": "x", "label": {"a": 1}}',
            "line 1, column 'label': {'a': 1}, no text",
        ),
        ("a.jsonl", '{"text": "\\ud800", "label": 1}', "column 'text': half a character"),
        ("a.jsonl", '{"text": "x", "label": %s}' % ("1" * 5000), "line 1: Exceeds the limit"),
        ("a.jsonl", "[" * 100_000, "line 1: "),
        ("a.json", "[" * 100_000, "line 1: "),
        ("a.json", '[\n{"text": "x", "label": 1},\n{"text"}]', "line 3, character 8: Expecting"),
        ("a.json", '[\n{"text": "x", "label": 1}\n\n{"text"}]', "line 4: '{\"text\"}]' after an"),
        ("a.json", '[\n{"text": "x", "label": 1}\n', "line 3: '' after an element"),
        ("a.json", '[{"text": "x", "label": 1},\n 3]', "line 2: 3; accepted: a JSON object"),
        ("a.json", '[{"text": "x", "label": 1}]\n[2]', "line 1: more text after the array"),
        ("a.json", "[]", "which holds no examples"),
        ("a.json", "{\n}", "line 1, character 2: Expecting"),
    ],
)
def test_what_is_wrong_has_its_line(name, text, told, tmp_path):
    (tmp_path / name).write_text(text)
    with pytest.raises(ArgumentError) as caught:
        read_examples(str(tmp_path / name), BOTH)
    assert told in str(caught.value) and name in str(caught.value)
