"""Files of text with any content are read, or one error says what is wrong where."""

import bz2
import csv
import gzip
import io
import json
import lzma
import random
from collections.abc import Callable

import pytest
from damaged_files import damage
from mutants import Mutants, mutate_json, mutate_text, spoil

from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples

CASES = 60  # for each seed
ROWS = [
    {"text": "a great film", "label": "fun", "prompt": "what?", "group": "g1"},
    {"text": 'said "dull"; twice', "label": "dull", "prompt": "é?", "group": "g2"},
    {"text": "two\nlines", "label": "3.5", "prompt": "", "group": "g2"},
]
CHATS = [
    {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "ho"}]},
    {
        "messages": [
            {"role": "system", "content": "be"},
            {"role": "user", "content": [{"type": "text", "text": "hi"}]},
            {"role": "assistant", "content": "ho", "weight": 0, "tool_calls": None},
            {"role": "user", "content": "again"},
            {"role": "assistant", "content": "so"},
        ],
        "tools": [{"name": "f"}],
    },
]
SHARED = [{"conversations": [{"from": "human", "value": "hi"}, {"from": "gpt", "value": "ho"}]}]
ALPACA = [
    {"instruction": "do", "input": "x", "output": "y", "system": "s", "history": [["a", "b"]]},
    {"instruction": "do", "input": "", "output": "y"},
]
SQUAD = {
    "version": "1.1",
    "data": [
        {
            "title": "t",
            "paragraphs": [
                {
                    "context": "red and blue",
                    "qas": [
                        {
                            "id": "1",
                            "question": "which?",
                            "answers": [{"text": "blue", "answer_start": 8}],
                        }
                    ],
                }
            ],
        }
    ],
}
TABLES = (ROWS, CHATS, SHARED, ALPACA)


def table(delimiter: str) -> Callable:
    def write(rows: object) -> bytes:
        text = io.StringIO()
        names = list(dict.fromkeys(name for row in rows for name in row))
        writer = csv.DictWriter(text, names, delimiter=delimiter)
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue().encode("utf-8", "surrogatepass")

    return write


def lines(rows: object) -> bytes:
    return "\n".join(json.dumps(row) for row in rows).encode()


def plain(rows: object) -> bytes:
    return "\n".join(str(row.get("text", "x")) for row in rows).encode()


def whole(value: object) -> bytes:
    return json.dumps(value).encode()


# Ending, how rows become a file, what may stand in it, and whether its values may be mutated.
FORMATS: dict[str, tuple] = {
    "csv": (table(","), (ROWS,), False),
    "tsv": (table("\t"), (ROWS,), False),
    "jsonl": (lines, TABLES, True),
    "json": (whole, (*TABLES, SQUAD), True),
    "squad": (whole, (SQUAD,), True),
    "txt": (plain, (ROWS,), False),
    "label-text": (plain, (ROWS,), False),
}
PACKERS = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def forge(format: str, folder, random_: random.Random):
    """Write a file that is damaged, or holds other values; returns its path and what it holds."""
    write, contents, values = FORMATS[format]
    value = random_.choice(contents)
    if values and random_.random() < 0.6:
        changed = mutate_json(value, random_)
        blob = write(changed) if write is whole or isinstance(changed, list) else whole(changed)
    else:
        blob = mutate_text(write(value), random_)
    path = folder / f"data.{format}"
    shown = repr(blob[:200])
    if random_.random() < 0.1:
        ending = random_.choice(list(PACKERS))
        path = path.with_name(path.name + ending)
        blob = PACKERS[ending](blob)
        blob = blob if random_.random() < 0.5 else damage(blob, random_)
    path.write_bytes(blob)
    return path, spoil(path, random_) if random_.random() < 0.03 else shown


def layout(format: str, random_: random.Random) -> Layout:
    """What a user says, mostly right."""
    columns = {
        "text": [None, None, "text", "messages", "1", "", "none", "é"],
        "label": [None, "label", "label", "none", "2", "absent"],
        "prompt": [None, None, None, "prompt", "none"],
        "group": [None, None, "group"],
        "delimiter": [None] * 12 + [",", "tab", ";", "\0", "é", "ab", '"'],
        "encoding": [None] * 12 + ["utf-8", "utf-16", "cp1252", "ascii", "cp037", "idna", "x"],
    }
    return Layout(format=format, **{name: random_.choice(v) for name, v in columns.items()})


@pytest.mark.check(short=1, long=16)
@pytest.mark.parametrize("format", FORMATS)
def test_files_of_text(format, seed, tmp_path, tally):
    random_ = random.Random(f"{format} {seed}")
    mutants = Mutants()
    for number in range(CASES):
        folder = tmp_path / str(number)
        folder.mkdir()
        path, shown = forge(format, folder, random_)
        said = layout(format, random_)

        def read(path=path, said=said):
            for example in read_examples(str(path), said):
                assert isinstance(example.text, str) and isinstance(example.prompt, str)
                (example.text + example.prompt + str(example.label)).encode()

        mutants.attempt(f"{path.name}, case {number}, {said}: {shown}", read)
    mutants.conclude(tally, "files of text")
