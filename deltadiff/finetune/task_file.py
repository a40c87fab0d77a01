"""The file beside an adapter that says what it was trained for: task.json.

An adapter holds tensors. What the outputs of its head mean, and the chat template that
``--chat-template`` gave, would be lost without these files, and `deltadiff merge` could not write
them into the merged model.

    task.json             {"format": "deltadiff-task", "task": "classes", "labels": ["bad", "good"]}
    chat_template.jinja   only where it is not the tokenizer's own
"""

import json
from pathlib import Path

from ..errors import CheckpointError
from ..files import reading, write_json, write_text
from .tasks.base import Task
from .tasks.choose import TASKS
from .tasks.classes import ClassTask

FORMAT = "deltadiff-task"
TASK_FILE, TEMPLATE_FILE = "task.json", "chat_template.jinja"


def write_task(folder: Path, task: Task, chat_template: str | None = None) -> None:
    """Write down what an adapter in this folder was trained for."""
    value: dict[str, object] = {"format": FORMAT, "task": task.name}
    if isinstance(task, ClassTask):
        value["labels"] = list(task.labels)
    write_json(folder / TASK_FILE, value)
    if chat_template is not None:
        write_text(folder / TEMPLATE_FILE, chat_template)


def read_task(folder: Path) -> Task | None:
    """The task that an adapter was trained for; None if it was not `deltadiff finetune` that did.

    Raises:
        CheckpointError: the file is garbled, or of another version of deltadiff.
    """
    path = folder / TASK_FILE
    if not path.exists():
        return None
    accepted = "what `deltadiff finetune` wrote beside the adapter"
    with reading(path, accepted):
        value = json.loads(path.read_text(encoding="utf-8"))
        kind = {kind.name: kind for kind in TASKS}[value["task"]]
        if value["format"] != FORMAT:
            raise CheckpointError(str(path), f"format {value['format']!r}", accepted)
        if kind is not ClassTask:
            return kind()
        labels = value["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(str(path), f"labels {labels!r:.60}", accepted)
        return ClassTask(tuple(labels))
