"""The file that says what an adapter was trained for."""

import pytest
from finetune_runs import flip_a_bit

from deltadiff.errors import CheckpointError
from deltadiff.files import read_sealed_json, write_sealed_json
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
    write_sealed_json(path, read_sealed_json(path, "") | change)
    with pytest.raises(CheckpointError, match="task.json"):
        read_task(tmp_path)
    path.write_text("{")
    with pytest.raises(CheckpointError, match="task.json"):
        read_task(tmp_path)


@pytest.mark.parametrize("name", ["task.json", "chat_template.jinja"])
def test_a_flipped_bit(name, tmp_path):
    write_task(tmp_path, ClassTask(("a", "b")), "{{ messages }}")
    flip_a_bit(tmp_path / name, (tmp_path / name).read_bytes().index(b"ss"))
    with pytest.raises(CheckpointError, match=name):
        read_task(tmp_path)


def test_a_file_of_an_earlier_version(tmp_path):
    (tmp_path / "task.json").write_text('{"format": "deltadiff-task", "task": "text"}')
    assert read_task(tmp_path) == TextTask()
