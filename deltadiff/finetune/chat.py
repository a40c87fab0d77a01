"""Conversations as tokens, by the chat template of a tokenizer; the answers alone have a loss.

Where the template marks the answers itself, with `{% generation %}`, transformers says which tokens
are theirs. Elsewhere an answer is what the template adds to the prompt that it makes of the earlier
messages. That prompt has to be the beginning of the whole text, which is checked: only then does
the model see in training what it will see in use. Some templates render earlier answers in another
way than the last one, without its reasoning for instance. Under these each answer becomes a row of
its own, with what came before it.
"""

import dataclasses
import re
from collections.abc import Sequence
from pathlib import Path

from ..errors import ArgumentError
from .data.conversations import in_words, words
from .data.examples import Conversation, Example
from .data.skipped import Skipped

Row = tuple[Example, list[int], list[bool]]  # an example, its token ids, and which are learnt

# What `--chat-template plain` stands for. Each turn begins on a line of its own, so that a prompt
# and the answer below it are the same tokens, whether they are encoded together or apart.
PLAIN_TEMPLATE = """\
{%- for message in messages -%}
{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim -}}
{{- (eos_token or '') if message['role'] == 'assistant' else '' -}}
{{- '\\n\\n' -}}
{%- endfor -%}
{{- '### Assistant:\\n' if add_generation_prompt else '' -}}
"""

ANOTHER = "another template: --chat-template FILE, or --chat-template plain"


def read_template(name: str) -> str:
    """The template that ``--chat-template`` names: "plain", or a file.

    Raises:
        ArgumentError: there is no such file, or it cannot be read.
    """
    if name == "plain":
        return PLAIN_TEMPLATE
    try:
        return Path(name).read_text(encoding="utf-8")
    except (OSError, ValueError) as error:
        accepted = 'a file with a Jinja template, or "plain"'
        raise ArgumentError("chat_template", f"{name} ({error})", accepted) from error


def encode_chats(examples: Sequence[Example], tokenizer, skipped: Skipped) -> list[Row]:
    """The rows of conversations. ``skipped`` gets those that the template refuses.

    Raises:
        ArgumentError: the tokenizer has no chat template, or does not tell where its tokens stand;
            or the template leaves a message out, or does not render the answers at one place.
    """
    from jinja2.exceptions import TemplateError

    if not getattr(tokenizer, "chat_template", None):
        given = "nothing, and the model's tokenizer has no template"
        raise ArgumentError("chat_template", given, "--chat-template plain, or FILE with one")
    if not tokenizer.is_fast:
        given = f"{type(tokenizer).__name__}, which does not tell where a token stands"
        raise ArgumentError("model", given, "a model with a fast tokenizer")
    rows = []
    for example in examples:
        try:
            rows += _rows(example, tokenizer)
        except TemplateError as error:
            reason = " ".join(str(error).split())
            skipped.add(f"that the chat template refuses ({reason:.80})", example.place)
    return rows


def prompt_ids(conversation: Conversation, tokenizer) -> list[int]:
    """The tokens that ask for the last answer.

    Raises:
        ArgumentError: the template refuses to render what stands before it.
    """
    from jinja2.exceptions import TemplateError

    try:
        text = _render(tokenizer, conversation, len(conversation.messages) - 1, prompt=True)
    except TemplateError as error:
        given = f"a template that refuses a prompt ({' '.join(str(error).split()):.80})"
        raise ArgumentError("chat_template", given, ANOTHER) from error
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def turn_ends(row: Row, tokenizer) -> set[int]:
    """The special tokens that may end an answer: the one that ends this row's, if one does."""
    _, ids, learnt = row
    last = max(i for i, counts in enumerate(learnt) if counts)
    special = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return {ids[last]} & special


def _rows(example: Example, tokenizer) -> list[Row]:
    chat = example.conversation
    said = [i for i, message in enumerate(chat.messages) if message["role"] == "assistant"]
    if _marks_answers(tokenizer) and list(chat.answers) == said:
        row = _marked_row(example, tokenizer)
        if row is not None:
            return [row]
    row = _compared_row(example, tokenizer)
    if row is not None:
        return [row]
    rows = [_compared_row(_cut_after(example, answer), tokenizer) for answer in chat.answers]
    if None not in rows:
        return rows
    given = f"a template whose prompts are not the beginning of {example.place}"
    raise ArgumentError("chat_template", given, ANOTHER)


def _cut_after(example: Example, answer: int) -> Example:
    """The example of a conversation that ends with message ``answer``."""
    chat = example.conversation.only(answer)
    *before, last = chat.messages
    return dataclasses.replace(
        example, text=words(last), prompt=in_words(before), conversation=chat
    )


# ------------------------------------------------------- the two ways to find the answers


def _marks_answers(tokenizer) -> bool:
    template = tokenizer.chat_template
    texts = template.values() if isinstance(template, dict) else [template]
    return all(re.search(r"\{%-?\s*generation\s*-?%\}", text) for text in texts)


def _marked_row(example: Example, tokenizer) -> Row | None:
    """The row in which the template marks the answers; None where the marks are lost.

    transformers finds the tokens of a mark by its first and last character, and goes wrong where
    one of the two is in no token. The answers then do not stand apart any more.
    """
    chat = example.conversation
    found = _apply(
        tokenizer, chat, chat.messages, tokenize=True, return_dict=True,
        return_assistant_tokens_mask=True,
    )  # fmt: skip
    learnt = [bool(m) for m in found["assistant_masks"]]
    runs = sum(now and not before for before, now in zip([False, *learnt], learnt, strict=False))
    roles = [message["role"] for message in chat.messages]
    turns = sum(
        now == "assistant" != before for before, now in zip(["", *roles], roles, strict=False)
    )
    if not turns <= runs <= roles.count("assistant"):
        return None
    return example, found["input_ids"], learnt


def _compared_row(example: Example, tokenizer) -> Row | None:
    """The row whose answers are what the template adds to their prompts; None where it does not."""
    chat = example.conversation
    text, spans = _render(tokenizer, chat, len(chat.messages)), []
    for number, message in enumerate(chat.messages, 1):
        if message["role"] in ("system", "developer", "user"):
            if str(message["content"]).strip() not in text:
                role = message["role"]
                given = f"a template that leaves out message {number} ({role}) of {example.place}"
                raise ArgumentError("chat_template", given, ANOTHER)
    for answer in chat.answers:
        before = _render(tokenizer, chat, answer, prompt=True)
        after = _render(tokenizer, chat, answer + 1)
        if not (text.startswith(after) and after.startswith(before)):
            return None
        spans.append((len(before), _end(after, tokenizer)))
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    learnt = [
        any(first <= start < last or start < first < end for first, last in spans)
        for start, end in found["offset_mapping"]
    ]
    return example, found["input_ids"], learnt


def _end(text: str, tokenizer) -> int:
    """Where the last answer of a text ends: nothing is learnt after the token that ends a turn."""
    bare = text.rstrip()
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    return len(bare) if special and bare.endswith(tuple(special)) else len(text)


def _render(tokenizer, chat: Conversation, count: int, prompt: bool = False) -> str:
    """The first ``count`` messages as text; ``prompt`` asks for the beginning of an answer."""
    messages = chat.messages[:count]
    return _apply(tokenizer, chat, messages, tokenize=False, add_generation_prompt=prompt)


def _apply(tokenizer, chat: Conversation, messages: Sequence, **options):
    """What the template makes of some messages.

    Raises:
        TemplateError: the template refuses them, or is none. A template is a program, and whatever
            goes wrong in it counts as its refusal.
    """
    from jinja2.exceptions import TemplateError

    try:
        found = tokenizer.apply_chat_template(
            list(messages), tools=list(chat.tools) or None, **options
        )
        if isinstance(found, str):
            found.encode()  # no tokenizer takes halves of characters
        return found
    except TemplateError:
        raise
    except Exception as error:
        raise TemplateError(f"{type(error).__name__}: {error}") from error
