"""Conversations in the forms in which people have them, made into that of chat templates.

    messages         [{"role": "user", "content": "..."}, ...]      OpenAI, Hugging Face
    conversations    [{"from": "human", "value": "..."}, ...]       ShareGPT
    instruction, input, output, and system and history where there are any     Alpaca

A message with "weight": 0 is not learnt, as in OpenAI's files. A column "tools" describes functions
that the assistant may call.
"""

import json
import re
from collections.abc import Mapping, Sequence

from ...errors import ArgumentError
from .examples import Conversation
from .json_rows import parse

ROLES = {
    "system": "system", "developer": "developer",
    "user": "user", "human": "user",
    "assistant": "assistant", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant",
    "tool": "tool", "function": "tool", "observation": "tool",
}  # fmt: skip
FORMS = (("role", "content"), ("from", "value"))
MESSAGE = 'a message such as {"role": "user", "content": "..."} or {"from": "human", "value": ...}'

EMPTY_MESSAGE = "with an empty message"
NO_ANSWER = "without an answer"


class Unusable(Exception):
    """A conversation from which nothing can be learnt; it holds the reason."""


def find_messages(value: object, place: str) -> list | None:
    """The list of messages in a cell, where it may stand as JSON; None if the cell has none."""
    if isinstance(value, str) and re.match(r'\s*\[\s*\{\s*"(role|content|from|value)"\s*:', value):
        value = parse(value, place)
    first = value[0] if isinstance(value, list) and value else None
    known = isinstance(first, dict) and any(set(form) <= first.keys() for form in FORMS)
    return value if known else None


def read_messages(value: Sequence[object], tools: object, place: str) -> Conversation:
    """The conversation in a list of messages, up to the last answer that is learnt.

    Raises:
        ArgumentError: an element is no message; it is about ``place``.
        Unusable: a message is empty, or there is no answer.
    """
    messages, answers = [], []
    for number, item in enumerate(value, 1):
        message, weight = _message(item, f"{place}, message {number}")
        if message["role"] == "assistant" and weight:
            answers.append(len(messages))
        messages.append(message)
    if not answers:
        raise Unusable(NO_ANSWER)
    return Conversation(tuple(messages[: answers[-1] + 1]), tuple(answers), _tools(tools, place))


def read_alpaca(cells: Mapping[str, object], place: str) -> Conversation:
    """The conversation in a row of Alpaca's columns: the input stands below the instruction.

    Raises:
        ArgumentError: a cell holds something else than text; it is about ``place``.
        Unusable: there is no instruction or no output.
    """
    texts = {
        name: as_text(cells.get(name), f"{place}, column {name!r}")
        for name in ("system", "instruction", "input", "output")
    }
    turns: list[tuple[str, object]] = [("system", texts["system"])] if texts["system"] else []
    history = cells.get("history") or []
    if isinstance(history, str):
        history = parse(history, f"{place}, column 'history'")
    for pair in history:
        if not isinstance(pair, Sequence) or isinstance(pair, str) or len(pair) != 2:
            given = f"{place}, column 'history': {pair!r:.40}"
            raise ArgumentError("data", given, "pairs of a question and an answer")
        turns += zip(("user", "assistant"), pair, strict=True)
    asked = "\n\n".join(filter(None, (texts["instruction"], texts["input"])))
    turns += [("user", asked), ("assistant", texts["output"])]
    messages = [{"role": role, "content": content} for role, content in turns]
    return read_messages(messages, None, place)


def as_text(value: object, place: str) -> str | None:
    """Text as it is, or None.

    Raises:
        ArgumentError: something else, or text that no tokenizer takes; it is about ``place``.
    """
    if value is None:
        return None
    if not isinstance(value, str):
        raise ArgumentError("data", f"{place}: {value!r:.40}, no text", "text")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        given = f"{place}: half a character ({value[error.start]!r})"
        raise ArgumentError("data", given, "text that UTF-8 can write") from error
    return value


def in_words(messages: Sequence[Mapping[str, object]]) -> str:
    """Messages as people read them, a turn below the other."""
    return "\n".join(f"{m['role']}: {words(m)}" for m in messages)


def words(message: Mapping[str, object]) -> str:
    """What a message says; of one that only calls functions, the calls."""
    return str(message.get("content") or json.dumps(message.get("tool_calls")))


def _message(item: object, place: str) -> tuple[dict[str, object], int]:
    """A message in the form of chat templates, and whether it may be learnt."""
    filled = {k for k, v in item.items() if v is not None} if isinstance(item, dict) else ()
    form = next((form for form in FORMS if form[0] in filled), None)
    if form is None:
        raise ArgumentError("data", f"{place}: {item!r:.60}", MESSAGE)
    rest = {k: v for k, v in item.items() if k not in (*form, "weight") and v is not None}
    role = ROLES.get(str(item[form[0]]).strip().lower())
    if role is None:
        given = f"{place}: {form[0]} {item[form[0]]!r:.40}"
        raise ArgumentError("data", given, f"one of {', '.join(ROLES)}")
    weight = 1 if item.get("weight") is None else item["weight"]
    if weight not in (0, 1):
        raise ArgumentError("data", f"{place}: weight {weight!r}", "0 or 1")
    content = _content(item.get(form[1]), place)
    if content is None or not content.strip():
        if role in ("user", "assistant") and not rest.get("tool_calls"):
            raise Unusable(EMPTY_MESSAGE)
    return {"role": role, "content": content or "", **rest}, weight


def _content(value: object, place: str) -> str | None:
    """The text of a message, whose parts some write as a list."""
    if not isinstance(value, list):
        return as_text(value, place)
    parts = []
    for part in value:
        if not isinstance(part, dict) or not isinstance(part.get("text"), str):
            raise ArgumentError("data", f"{place}: a part {part!r:.60}", "parts that are text")
        parts.append(as_text(part["text"], place))
    return "".join(parts)


def _tools(value: object, place: str) -> tuple[Mapping[str, object], ...]:
    """The functions in a column "tools", which is a list, or JSON of one."""
    place = f"{place}, column 'tools'"
    if isinstance(value, str) and value.strip():
        value = parse(value, place)
    if not value:
        return ()
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ArgumentError("data", f"{place}: {value!r:.60}", "a list of JSON objects")
    return tuple(value)
