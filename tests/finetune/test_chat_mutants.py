"""Chat templates of any content encode conversations, or an error names the template."""

import random
import re

import pytest
from mutants import Mutants, odd_value
from word_tokenizer import TEMPLATE, word_tokenizer

from deltadiff.finetune.chat import PLAIN_TEMPLATE, encode_chats, prompt_ids
from deltadiff.finetune.data.conversations import read_messages
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.data.skipped import Skipped

CASES = 100  # for each seed
MARKED = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content }}"
    "{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)
PARTS = (
    "{{ messages }}", "{{ messages[99] }}", "{{ x.y.z }}", "{{ 1 / 0 }}", "{{", "{%", "%}", "{#",
    "{% for %}", "{% if %}", "{% endfor %}", "{{ messages | nope }}", "{{ messages | tojson }}",
    "{{ raise_exception('no') }}", "{{ raise_exception() }}", "{% include 'x' %}", "\0", "é", "\n",
    "{% import 'os' as os %}", "{{ ''.__class__.__mro__ }}", "{{ messages.append(1) }}",
    "{% generation %}", "{% endgeneration %}", "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "{{ m['content'][99] }}", "{{ m['role'] | int }}", "{{ messages | map(attribute='a') | list }}",
    "{{ range(3) | random }}", "{{ strftime_now('%Y') }}", "{{ strftime_now(1) }}", "{{ tools }}",
    "{{ messages[0] + 1 }}", "{{ undefined + 1 }}", "{{ 'a' * 3 }}", "{% set messages = 1 %}",
    "{{ messages[0]['content'] }}", "{{ eos_token }}", "{{ '%d' | format('x') }}", "\ud800",
    "{{ 'x' | tojson(indent='a') }}", "{{ [] | first }}", "{{ {} | max }}", "{{ messages | join }}",
)  # fmt: skip


def forge(random_: random.Random) -> object:
    """A template with parts lost and put in."""
    text = random_.choice([TEMPLATE, PLAIN_TEMPLATE, MARKED])
    for _ in range(random_.choice([1, 1, 2, 3])):
        start = random_.randrange(len(text) + 1)
        if random_.random() < 0.7:  # where text may stand
            start = random_.choice([m.end() for m in re.finditer("^|[%}]}", text)])
        end = start + random_.choice([0, 0, 1, 5, 40])
        text = text[:start] + random_.choice(["", random_.choice(PARTS)]) + text[end:]
    return text


def example(random_: random.Random) -> Example:
    """A conversation, whose messages hold what templates may look at."""
    more = {"reasoning": odd_value(random_)} if random_.random() < 0.2 else {}
    messages = [
        {"role": "system", "content": "red"},
        {"role": "user", "content": "is one two"},
        {"role": "assistant", "content": "not green", **more},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": "three"},
    ]
    chat = read_messages(messages, None, "chats.json, line 1")
    return Example("three", prompt="x", conversation=chat, place="chats.json, line 1")


@pytest.mark.check(short=1, long=20)
def test_templates(seed, tally):
    random_ = random.Random(seed)
    mutants = Mutants()
    tokenizer = word_tokenizer()
    for number in range(CASES):
        tokenizer.chat_template = forge(random_)
        case = f"case {number}: {tokenizer.chat_template!r}"
        chats = [example(random_)]
        if mutants.attempt(case, lambda c=chats: encode_chats(c, tokenizer, Skipped())):
            mutants.attempt(case, lambda c=chats: prompt_ids(c[0].conversation, tokenizer))
    mutants.conclude(tally, "chat templates")
