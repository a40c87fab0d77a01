"""Which task some examples are for."""

import pytest

from deltadiff.errors import ArgumentError
from deltadiff.finetune.data.examples import Example
from deltadiff.finetune.settings import Settings
from deltadiff.finetune.tasks.choose import METRIC_TITLES, TASKS, find_task
from deltadiff.finetune.tasks.classes import ClassTask
from deltadiff.finetune.tasks.numbers import NumberTask
from deltadiff.finetune.tasks.spans import SpanTask
from deltadiff.finetune.tasks.text import TextTask

LABELLED = [Example("x", "1"), Example("y", "0")]
ASKED = [Example("x", prompt="q", answers=(("x", 0),)), Example("y", prompt="q", answers=())]


@pytest.mark.parametrize(
    ("examples", "more", "task"),
    [
        (LABELLED, {}, ClassTask(("0", "1"))),
        (LABELLED, {"regression": True}, NumberTask()),
        (ASKED, {"doc_stride": 3}, SpanTask(3)),
        (ASKED[1:], {}, SpanTask(64)),
        ([Example("x"), Example("y", prompt="p")], {"generate": 2}, TextTask()),
    ],
)
def test_the_task_of_examples(examples, more, task):
    assert find_task(examples, Settings("m", "d", **more)) == task


@pytest.mark.parametrize(("examples", "regression"), [(LABELLED, 0), (LABELLED, 1), (ASKED, 0)])
def test_only_text_is_generated(examples, regression):
    with pytest.raises(ArgumentError, match="generate: got 2"):
        find_task(examples, Settings("m", "d", generate=2, regression=bool(regression)))


@pytest.mark.parametrize("task", TASKS)
def test_every_metric_has_a_title(task):
    assert task.metric_titles and set(task.metric_titles) <= set(METRIC_TITLES)
