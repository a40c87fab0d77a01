"""`examples_from`: the examples in the rows of a table, whatever file they come from."""

import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping

from ...errors import ArgumentError
from .conversations import (
    Unusable,
    as_text,
    find_messages,
    in_words,
    read_alpaca,
    read_messages,
    words,
)  # fmt: skip
from .examples import Conversation, Example
from .layout import Layout, is_column
from .source import Row, Source

# Where the text is when nobody names a column: the first of these that a table has.
TEXT_COLUMNS = ("text", "messages", "conversations")
ALPACA = ("instruction", "output")
ALPACA_ALL = (*ALPACA, "input", "system", "history")

NO_TEXT, NO_LABEL, NO_PROMPT = "without text", "without a label", "without a prompt"

Reader = Callable[[Mapping[str, object], str], Example]


def examples_from(rows: Iterator[Row], source: Source) -> Iterator[Example]:
    """The examples in rows. What the first row has decides how all are read.

    A row whose text or label is empty or null is left out, and ``source.skipped`` says so.

    Raises:
        ArgumentError: the first row lacks a column; or a cell holds what cannot be read.
    """
    read: Reader | None = None
    for place, cells in rows:
        try:
            read = read or _reader(cells, source.layout, place)
            yield read(cells, place)
        except Unusable as reason:
            source.skipped.add(str(reason), place)


def used_columns(names: Collection[str], layout: Layout) -> list[str]:
    """Those of the columns ``names`` that `examples_from` looks at."""
    text = _text_column(names, layout)
    used = set(layout.asked) | (set(ALPACA_ALL) if text is None else {text, "tools"})
    return [name for name in names if name in used]


def _text_column(names: Collection[str], layout: Layout) -> str | None:
    """The column with the text, whether or not the table has it; None where Alpaca's stand."""
    if layout.text is not None:
        return layout.text
    found = next((name for name in TEXT_COLUMNS if name in names), None)
    if found is None and not is_column(layout.prompt) and set(ALPACA) <= set(names):
        return None
    return found or "text"


def _reader(cells: Mapping[str, object], layout: Layout, place: str) -> Reader:
    """How the rows of a table are read whose first row is this one."""
    text = _text_column(cells, layout)
    columns = {f: c for f in ("label", "prompt", "group") if is_column(c := getattr(layout, f))}
    columns |= {} if text is None else {"text": text}
    for field, column in columns.items():
        if column not in cells:
            given = f"{column!r}, which {place} lacks"
            accepted = f"one of {', '.join(map(repr, cells)) or 'none'}"
            raise ArgumentError(f"{field}_column", given, accepted)
    if text is not None and cells[text] in (None, []):
        raise Unusable(NO_TEXT)  # it does not show yet whether the column holds conversations
    if text is None or find_messages(cells[text], place):
        for field in ("label", "prompt"):
            if field in columns:
                given = f"{columns[field]!r} beside the conversation in {place}"
                accepted = "none: the answers of a conversation are learnt"
                raise ArgumentError(f"{field}_column", given, accepted)
        return _conversation_reader(text, columns.get("group"))
    return _text_reader(columns, layout.labels)


def _conversation_reader(column: str | None, group: str | None) -> Reader:
    def read(cells: Mapping[str, object], place: str) -> Example:
        if column is None:
            conversation = read_alpaca(cells, place)
        elif cells.get(column) in (None, []):
            raise Unusable(NO_TEXT)
        elif messages := find_messages(cells[column], place):
            conversation = read_messages(messages, cells.get("tools"), place)
        else:
            given = f"{place}, column {column!r}: {cells[column]!r:.60}"
            raise ArgumentError("data", given, "a list of messages, as in other rows")
        return _from_conversation(conversation, _cell(cells, group, place), place)

    return read


def _from_conversation(conversation: Conversation, group: str | None, place: str) -> Example:
    *before, last = conversation.messages
    return Example(
        words(last), prompt=in_words(before), group=group, conversation=conversation, place=place
    )


def _text_reader(columns: Mapping[str, str], labels: Collection[str]) -> Reader:
    """Reads text, and its label, prompt and group where ``columns`` names them."""

    def read(cells: Mapping[str, object], place: str) -> Example:
        found = {field: _cell(cells, column, place) for field, column in columns.items()}
        for field, reason in (("text", NO_TEXT), ("label", NO_LABEL)):
            if field in columns and not found[field]:
                raise Unusable(reason)
        if "prompt" in columns and found["prompt"] is None:
            raise Unusable(NO_PROMPT)
        if labels and found.get("label") not in (None, *labels):
            raise Unusable(f"labelled neither {' nor '.join(labels)}")
        return Example(**found, place=place)

    return read


def _cell(cells: Mapping[str, object], column: str | None, place: str) -> str | None:
    """What a cell says, without the space around it; None for null, NaN and a missing cell."""
    value = None if column is None else cells.get(column)
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return as_text(value, f"{place}, column {column!r}").strip()
