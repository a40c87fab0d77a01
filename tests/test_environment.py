"""The command in odd environments, in real processes: Python reads much of that when it starts."""

import os
import subprocess
import sys

import pytest

WORDS = [sys.executable, "-m", "deltadiff"]


def run(*words, shell: str = "", **variables) -> subprocess.CompletedProcess:
    """Run the command with these variables; ``shell`` is what follows the words in a shell."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **variables}
    line = f'exec "$@" {shell}' if "|" not in shell else f'"$@" {shell}'
    return subprocess.run(
        ["bash", "-c", line, "bash", *WORDS, *map(str, words)],
        env=environment, capture_output=True, text=True, timeout=120,
    )  # fmt: skip


def test_text_outside_of_ascii(tmp_path):
    """Not even stdout need take it, and a notebook may have set its own backend for figures."""
    pytest.importorskip("matplotlib")
    variables = {"LC_ALL": "C", "PYTHONIOENCODING": "ascii", "COLUMNS": "1"}
    variables["MPLBACKEND"] = "module://matplotlib_inline.backend_inline"
    done = run("finetune", "bért", tmp_path / "dätä.csv", "--output", tmp_path / "öut", **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("deltadiff finetune: data: got")
    assert list(tmp_path.iterdir()) == []


def test_names_that_are_no_text_in_the_locale():
    variables = {"LC_ALL": "POSIX", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}
    done = run("finetune", "bért", **variables)
    assert done.returncode == 2 and done.stderr.count("\n") == 1
    assert done.stderr.startswith("deltadiff: argument: got")


@pytest.mark.parametrize(
    ("shell", "code", "told"),
    [
        (">/dev/full", 2, "No space left on device"),
        ("2>&- >&-", 0, ""),
        ("| head -0; exit ${PIPESTATUS[0]}", 1, ""),
    ],
    ids=["full", "closed", "pipe"],
)
def test_streams(shell, code, told):
    done = run("presets", shell=shell)
    assert done.returncode == code
    assert told in done.stderr and done.stderr.count("\n") == bool(told)
