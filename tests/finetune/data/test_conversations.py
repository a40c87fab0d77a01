"""Conversations in every form give the same messages, of which the answers are learnt."""

import json

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Conversation
from deltadiff.finetune.data.layout import Layout
from deltadiff.finetune.data.reading import read_examples
from deltadiff.finetune.data.skipped import Skipped

TURNS = [("system", "Be kind."), ("user", "Hi"), ("assistant", "Hello."), ("user", "Bye\n\nnow")]
TURNS.append(("assistant", "Bye."))
MESSAGES = tuple({"role": role, "content": text} for role, text in TURNS)
PLAIN = [dict(m) for m in MESSAGES]
SHAREGPT = [
    {"from": {"user": "human", "assistant": "gpt"}.get(role, role), "value": text}
    for role, text in TURNS
]
PARTS = [{**m, "content": [{"type": "text", "text": m["content"]}]} for m in PLAIN]
ALPACA = {
    "instruction": "Bye", "input": "now", "output": "Bye.", "system": "Be kind.",
    "history": [["Hi", "Hello."]],
}  # fmt: skip
EXPECTED = Conversation(MESSAGES, (2, 4))


def read(tmp_path, *rows: dict, layout: Layout = Layout()):  # noqa: B008, it is frozen
    """(examples, what was skipped) of the rows of a JSONL file."""
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    skipped = Skipped()
    return read_examples(str(tmp_path / "a.jsonl"), layout, skipped), skipped


@pytest.mark.parametrize(
    "row",
    [
        {"messages": PLAIN},
        {"id": 3, "conversations": SHAREGPT},
        {"conversations": PLAIN},
        {"messages": PARTS},
        {"messages": [*PLAIN, {"role": "user", "content": "One more question"}]},
        {"messages": json.dumps(PLAIN)},
        {"messages": [{**m, "name": None, "weight": None} for m in PLAIN], "tools": []},
        ALPACA,
        {**ALPACA, "history": json.dumps(ALPACA["history"])},
    ],
)
def test_all_forms_are_the_same_conversation(row, tmp_path):
    (example,), _ = read(tmp_path, row)
    assert example.conversation == EXPECTED
    assert example.text == "Bye." and example.label is None
    assert example.prompt == "system: Be kind.\nuser: Hi\nassistant: Hello.\nuser: Bye\n\nnow"


def test_a_column_of_conversations_that_is_named(tmp_path):
    (example,), _ = read(tmp_path, {"talk": PLAIN, "who": "a"}, layout=Layout("talk", group="who"))
    assert example.conversation == EXPECTED and example.group == "a"


def test_conversations_in_a_csv_file(tmp_path):
    import csv

    with (tmp_path / "a.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["messages"], [json.dumps(PLAIN)], [json.dumps(SHAREGPT)]])
    found = read_examples(str(tmp_path / "a.csv"))
    assert [e.conversation for e in found] == [EXPECTED, EXPECTED]


def test_messages_of_weight_0_are_not_learnt(tmp_path):
    messages = [{**m, "weight": int(i == 2)} if i % 2 == 0 else m for i, m in enumerate(PLAIN)]
    (example,), _ = read(tmp_path, {"messages": messages})
    assert example.conversation == Conversation(MESSAGES[:3], (2,))


def test_calls_of_tools_are_answers(tmp_path):
    call = {"function": {"name": "f", "arguments": {}}}
    messages = [PLAIN[1], {"role": "assistant", "content": None, "tool_calls": [call]}]
    tool = {"type": "function", "function": {"name": "f"}}
    for tools in ([tool], json.dumps([tool])):
        (example,), _ = read(tmp_path, {"messages": messages, "tools": tools})
        assert example.conversation.messages[1]["tool_calls"] == [call]
        assert example.conversation.tools == (tool,) and json.loads(example.text) == [call]


def test_an_alpaca_row_without_input(tmp_path):
    (example,), _ = read(tmp_path, {"instruction": "Hi", "input": "", "output": "Hello."})
    assert example.conversation == Conversation(MESSAGES[1:3], (1,))


def test_alpacas_columns_as_plain_text(tmp_path):
    (example,), _ = read(tmp_path, ALPACA, layout=Layout("output", prompt="instruction"))
    assert (example.text, example.prompt, example.conversation) == ("Bye.", "Bye", None)


def test_what_cannot_be_learnt_is_skipped_and_counted(tmp_path):
    rows = [None, [], PLAIN, PLAIN[:2], [PLAIN[1], {"role": "assistant", "content": " "}]]
    rows.append([{"role": "user", "content": None}, PLAIN[2]])
    found, skipped = read(tmp_path, *({"messages": m} for m in rows))
    assert len(found) == 1
    assert skipped.counts == {
        "without text": 2, "without an answer": 1, "with an empty message": 2
    }  # fmt: skip
    found, skipped = read(tmp_path, ALPACA, {**ALPACA, "output": ""}, {**ALPACA, "output": None})
    assert len(found) == 1 and skipped.counts == {"with an empty message": 2}


@pytest.mark.parametrize(
    ("row", "told"),
    [
        ({"messages": [*PLAIN, {"role": "judge", "content": "x"}]}, "message 6: role 'judge'"),
        ({"conversations": [*SHAREGPT, "x"]}, "message 6: 'x'; accepted: a message such as"),
        ({"messages": [*PLAIN, {"role": "user", "content": 3}]}, "message 6: 3, no text"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
            "message 1: a part {'type': 'image'}",
        ),
        ({"messages": [{**PLAIN[1], "weight": 0.5}]}, "message 1: weight 0.5"),
        ({"messages": [{**PLAIN[1], "content": "\ud800"}]}, "message 1: half a character"),
        ({"messages": PLAIN, "tools": "x"}, "column 'tools', character 1: Expecting value"),
        ({"messages": PLAIN, "tools": [3]}, "column 'tools': [3]"),
        ({"messages": "some text"}, "column 'messages': 'some text'; accepted: a list of messages"),
        ({**ALPACA, "instruction": ["x"]}, "column 'instruction': ['x'], no text"),
        ({**ALPACA, "history": [["x"]]}, "column 'history': ['x']"),
    ],
)
def test_what_is_no_conversation_has_its_place(row, told, tmp_path):
    first = {"messages": PLAIN} if "messages" in row else {"conversations": PLAIN}
    rows = [row] if "output" in row else [first, row]
    with pytest.raises(ArgumentError) as caught:
        read(tmp_path, *rows)
    assert told in str(caught.value) and f"a.jsonl, line {len(rows)}" in str(caught.value)


@pytest.mark.parametrize(
    ("row", "column"),
    [({"messages": PLAIN}, "label"), ({"messages": PLAIN}, "prompt"), (ALPACA, "label")],
)
def test_a_conversation_has_neither_label_nor_prompt(row, column, tmp_path):
    with pytest.raises(ArgumentError, match=f"{column}_column: got 'x' beside the conversation"):
        read(tmp_path, {**row, "x": "y"}, layout=Layout(**{column: "x"}))


def test_messages_are_not_learnt_as_json(tmp_path):
    """A column that holds no text is refused, also where it is no conversation."""
    with pytest.raises(ArgumentError, match="line 1, column 'messages': .*, no text"):
        read(tmp_path, {"messages": ["x"]}, layout=Layout("messages"))
