"""The file that says what an adapter was trained for."""

import json

import pytest

from deltadiff.errors import CheckpointError
from deltadiff.finetune.task_file import read_task, write_task
from deltadiff.finetune.tasks.choose import TASKS
from deltadiff.finetune.tasks.classes import ClassTask
from deltadiff.finetune.tasks.numbers import NumberTask
from deltadiff.finetune.tasks.spans import SpanTask
from deltadiff.finetune.tasks.text import TextTask

EVERY = [ClassTask(("böse", "gut")), NumberTask(), SpanTask(), TextTask()]


@pytest.mark.parametrize("task", EVERY)
def test_a_task_is_read_back(task, tmp_path):
    assert read_task(tmp_path) is None
    write_task(tmp_path, task)
    assert read_task(tmp_path) == task
    assert [p.name for p in tmp_path.iterdir()] == ["task.json"]


def test_every_task_has_a_name_of_its_own():
    assert len({task.name for task in TASKS}) == len(TASKS) == len(EVERY)


def test_a_template_is_kept(tmp_path):
    write_task(tmp_path, TextTask(), "{{ messages }}")
    assert (tmp_path / "chat_template.jinja").read_text() == "{{ messages }}"


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"}, {"task": "poems"}, {"task": None}, {"task": []}, {"labels": None},
        {"labels": [1]}, {"labels": "ab"},
    ],
)  # fmt: skip
def test_a_garbled_file(change, tmp_path):
    write_task(tmp_path, ClassTask(("a", "b")))
    path = tmp_path / "task.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="task.json"):
        read_task(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="task.json"):
        read_task(tmp_path)
