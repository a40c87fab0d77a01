"""The table of all tasks, and which of them some examples are for."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..data.examples import Example
from .base import Task
from .classes import ClassTask
from .numbers import NumberTask
from .spans import SpanTask
from .text import TextTask

if TYPE_CHECKING:
    from ..settings import Settings

# Examples are for the first of these that finds itself in them.
TASKS: tuple[type[Task], ...] = (ClassTask, SpanTask, NumberTask, TextTask)

METRIC_TITLES = {name: title for task in TASKS for name, title in task.metric_titles.items()}


def find_task(examples: Sequence[Example], settings: "Settings") -> Task:
    """The task that the examples are for.

    Raises:
        ArgumentError: the examples or the settings cannot be used for it.
    """
    found = (kind.found_in(examples, settings) for kind in TASKS)
    task = next(task for task in found if task is not None)
    task.check(settings)
    return task
