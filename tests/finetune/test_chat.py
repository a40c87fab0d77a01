"""Conversations by chat templates: the answers are learnt, and what ends them, and nothing else."""

import pytest

pytest.importorskip("transformers")
from chat_tokenizers import (
    CHATML,
    INSTRUCTIONS,
    MARKED,
    NO_SYSTEM,
    REASONING,
    byte_tokenizer,
)

from deltadiff.errors import ArgumentError
from deltadiff.finetune.chat import (
    PLAIN_TEMPLATE,
    encode_chats,
    prompt_ids,
    read_template,
    turn_ends,
)
from deltadiff.finetune.data.conversations import read_messages
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.skipped import Skipped


def chat(*texts: str, first: str = "user", weights=(), **more) -> Example:
    """An example of turns by user and assistant."""
    roles = ["user", "assistant"] if first == "user" else [first, "user", "assistant"]
    roles += ["user", "assistant"] * len(texts)
    messages = [{"role": r, "content": t} for r, t in zip(roles, texts, strict=False)]
    for message, weight in zip(messages, weights, strict=False):
        message["weight"] = weight
    return Example("", conversation=read_messages(messages, None, "here"), place="here", **more)


def learnt(example: Example, template: str) -> list[list[str]]:
    """For each row, the runs of text that are learnt."""
    tokenizer = byte_tokenizer(template)
    skipped, found = Skipped(), []
    for _, ids, flags in encode_chats([example], tokenizer, skipped):
        runs = []
        for i, (token, flag) in enumerate(zip(ids, flags, strict=True)):
            if flag and not (i and flags[i - 1]):
                runs.append([])
            if flag:
                runs[-1].append(token)
        found.append([tokenizer.decode(run) for run in runs])
    assert not skipped
    return found


TWO = chat("What is it?", "A film, été \U0001f3a5.", "And\n\nthen? ", " It is dull ")


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHATML, ["A film, été \U0001f3a5.<|end|>", " It is dull <|end|>"]),
        (MARKED, ["A film, été \U0001f3a5.<|end|>", " It is dull <|end|>"]),
        (INSTRUCTIONS, [" A film, été \U0001f3a5.</s>", " It is dull</s>"]),
        (PLAIN_TEMPLATE, ["A film, été \U0001f3a5.</s>", "It is dull</s>"]),
    ],
)
def test_the_answers_are_learnt_and_what_ends_them(template, expected):
    assert learnt(TWO, template) == [expected]


@pytest.mark.parametrize("template", [CHATML, MARKED, INSTRUCTIONS, PLAIN_TEMPLATE, REASONING])
def test_the_prompt_of_generation_is_the_beginning_of_the_row(template):
    tokenizer = byte_tokenizer(template)
    row = encode_chats([TWO], tokenizer, Skipped())[-1]
    example, ids, flags = row
    prompt = prompt_ids(example.conversation, tokenizer)
    assert ids[: len(prompt)] == prompt and flags[len(prompt)] and not flags[len(prompt) - 1]
    end = "</s>" if template in (INSTRUCTIONS, PLAIN_TEMPLATE) else "<|end|>"
    assert turn_ends(row, tokenizer) == {tokenizer.convert_tokens_to_ids(end)}


def test_nothing_is_added_in_front_of_a_template():
    tokenizer = byte_tokenizer(INSTRUCTIONS)
    (row,) = encode_chats([TWO], tokenizer, Skipped())
    assert row[1].count(tokenizer.bos_token_id) == 1


@pytest.mark.parametrize("template", [CHATML, MARKED])
def test_an_answer_of_weight_0_is_not_learnt(template):
    example = chat("What?", "A film.", "And then?", "A plot.", weights=(None, 0))
    assert learnt(example, template) == [["A plot.<|end|>"]]


def test_answers_that_are_rendered_in_another_way_later_have_rows_of_their_own():
    assert learnt(TWO, REASONING) == [
        ["(thinks)\n\nA film, été \U0001f3a5.<|end|>"],
        ["(thinks)\n\n It is dull <|end|>"],
    ]
    first, second = (row[0] for row in encode_chats([TWO], byte_tokenizer(REASONING), Skipped()))
    assert first.text == "A film, été \U0001f3a5." and first.prompt == "user: What is it?"
    assert len(first.conversation.messages) == 2 and second.conversation.answers == (3,)


def test_marks_that_transformers_loses_are_found_by_comparison():
    """A space at the end of an answer is in no token's span, for tokenizers that trim them."""
    lost = MARKED.replace("{{ m['content'] + '<|end|>' }}{% endg", "{{ m['content'] }}{% endg")
    lost = lost.replace("{% endgeneration %}", "{% endgeneration %}{{ '<|end|>' }}")
    example = chat("What?", "A film ", "And then?", "A plot ")
    assert learnt(example, lost) == [["A film <|end|>", "A plot <|end|>"]]


def test_tools_are_rendered():
    tool = {"type": "function", "function": {"name": "f"}}
    messages = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    example = Example("", conversation=read_messages(messages, [tool], "here"), place="here")
    tokenizer = byte_tokenizer("{{ tools | tojson if tools else '' }}" + CHATML)
    ((_, ids, _),) = encode_chats([example], tokenizer, Skipped())
    assert '"name": "f"' in tokenizer.decode(ids)


def test_what_a_template_refuses_is_skipped_and_counted():
    skipped = Skipped()
    examples = [chat("Be kind.", "What?", "A film.", first="system"), TWO]
    rows = encode_chats(examples, byte_tokenizer(INSTRUCTIONS), skipped)
    assert [row[0] for row in rows] == [TWO]
    assert skipped.counts == {"that the chat template refuses (roles must alternate)": 1}


@pytest.mark.parametrize(
    ("template", "told"),
    [
        (
            None,
            "chat_template: got nothing, and the model's tokenizer has no template; accepted: --",
        ),
        (NO_SYSTEM, "a template that leaves out message 1 (system) of here"),
        ("{% for m in messages %}{{ m['content'] }}{% endfor %}{{ messages | length }}", "here"),
    ],
)
def test_templates_that_cannot_be_used(template, told):
    example = chat("Be kind.", "What?", "A film.", first="system")
    with pytest.raises(ArgumentError) as caught:
        encode_chats([example], byte_tokenizer(template), Skipped())
    assert told in str(caught.value) and "--chat-template plain" in str(caught.value)


def test_a_tokenizer_without_offsets():
    class Slow:
        is_fast, chat_template = False, CHATML

    with pytest.raises(ArgumentError, match="model: got Slow, .* a fast tokenizer"):
        encode_chats([TWO], Slow(), Skipped())


def test_templates_are_named(tmp_path):
    (tmp_path / "a.jinja").write_text(CHATML)
    assert read_template(str(tmp_path / "a.jinja")) == CHATML
    assert read_template("plain") == PLAIN_TEMPLATE
    for name in (tmp_path / "none", tmp_path):
        with pytest.raises(ArgumentError, match="chat_template: got"):
            read_template(str(name))
