"""The file beside an adapter that says what it was trained for: task.json.

An adapter holds tensors. What the outputs of its head mean, and the chat template that
``--chat-template`` gave, would be lost without these files, and `deltadiff merge` could not write
them into the merged model.

    task.json             {"format": "deltadiff-task", "task": "classes", "labels": ["bad", "good"],
                           "chat_template": its SHA-256 or null, "checksum": that of all the others}
    chat_template.jinja   only where it is not the tokenizer's own
"""

from pathlib import Path

from ..errors import CheckpointError
from ..files import read_sealed_json, reading, sha256_of_file, write_sealed_json, write_text
from .tasks.base import Task
from .tasks.choose import TASKS
from .tasks.classes import ClassTask

FORMAT = "deltadiff-task"
TASK_FILE, TEMPLATE_FILE = "task.json", "chat_template.jinja"


def write_task(folder: Path, task: Task, chat_template: str | None = None) -> None:
    """Write down what an adapter in this folder was trained for."""
    value: dict[str, object] = {"format": FORMAT, "task": task.name, "chat_template": None}
    if isinstance(task, ClassTask):
        value["labels"] = list(task.labels)
    if chat_template is not None:
        write_text(folder / TEMPLATE_FILE, chat_template)
        value["chat_template"] = sha256_of_file(folder / TEMPLATE_FILE)
    write_sealed_json(folder / TASK_FILE, value)


def read_task(folder: Path) -> Task | None:
    """The task that an adapter was trained for; None if it was not `deltadiff finetune` that did.

    Raises:
        CheckpointError: a file is damaged, or of another version of deltadiff.
    """
    path = folder / TASK_FILE
    if not path.exists():
        return None
    accepted = "what `deltadiff finetune` wrote beside the adapter"
    with reading(path, accepted):
        value = read_sealed_json(path, accepted)
        kind = {kind.name: kind for kind in TASKS}[value["task"]]
        if value["format"] != FORMAT:
            raise CheckpointError(str(path), f"format {value['format']!r}", accepted)
        template = folder / TEMPLATE_FILE
        if value.get("chat_template") not in (None, template.exists() and sha256_of_file(template)):
            raise CheckpointError(str(template), "another SHA-256", "the file that was saved")
        if kind is not ClassTask:
            return kind()
        labels = value["labels"]
        if not isinstance(labels, list) or not all(isinstance(label, str) for label in labels):
            raise CheckpointError(str(path), f"labels {labels!r:.60}", accepted)
        return ClassTask(tuple(labels))
