"""`Example`: one text with what is to be learnt about it; and its split for evaluation."""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ...errors import ArgumentError


@dataclass(frozen=True)
class Conversation:
    """Messages in turn, in the form that chat templates take.

    Attributes:
        messages: objects with "role" and "content", and what else a template may use.
        answers: the places of the messages that are learnt, at least one; the last message is.
        tools: descriptions of the functions that the assistant may call.
    """

    messages: tuple[Mapping[str, object], ...]
    answers: tuple[int, ...]
    tools: tuple[Mapping[str, object], ...] = ()

    def only(self, answer: int) -> "Conversation":
        """The conversation up to message ``answer``, of which that message alone is learnt."""
        return Conversation(self.messages[: answer + 1], (answer,), self.tools)


@dataclass(frozen=True)
class Example:
    """One text with what is to be learnt about it.

    Attributes:
        text: the text itself; of a conversation, the last answer.
        label: its class or its number; None where the text itself is to be learnt.
        prompt: stands before the text. It is what a language model completes (and has no loss), the
            first of two sentences, or a question.
        group: examples of one group are never split between training and evaluation.
        answers: the parts of the text that answer the question, each with the position of its first
            character. It is empty for a question without an answer, and None without a question.
        conversation: the turns of a conversation, whose words ``prompt`` and ``text`` repeat.
        place: where the example was read, such as "a.csv, line 7".
    """

    text: str
    label: str | None = None
    prompt: str = ""
    group: str | None = None
    answers: tuple[tuple[str, int], ...] | None = None
    conversation: Conversation | None = None
    place: str = field(default="", compare=False)


def split_examples(
    examples: Sequence[Example], heldout: float, seed: int
) -> tuple[list[Example], list[Example]]:
    """(training, held-out): about the share ``heldout`` is held out, in whole groups.

    Raises:
        ArgumentError: the share leaves one of the two empty.
    """
    if not 0 < heldout < 1:
        raise ArgumentError("heldout", heldout, "a share above 0 and below 1, or a file")
    groups: dict[object, list[Example]] = {}
    for i, example in enumerate(examples):
        groups.setdefault(i if example.group is None else example.group, []).append(example)
    order = list(groups)
    random.Random(seed).shuffle(order)
    train, held = [], []
    for key in order:
        (held if len(held) < heldout * len(examples) else train).extend(groups[key])
    if not train:
        raise ArgumentError("heldout", heldout, f"a share that leaves some of {len(order)} groups")
    return train, held
