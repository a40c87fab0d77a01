"""The command `deltadiff` on mutants, inside the test process."""

import contextlib
import io
import warnings
from collections.abc import Sequence

import pytest
from mutants import Hang, Mutants, limits

from deltadiff.__main__ import main
from deltadiff.errors import Interrupted
from deltadiff.finetune import run

CODES = (0, 1, 2, 130)  # the last, where training would begin


def problem(argv: Sequence[object]) -> str | None:
    """What is wrong with how the command takes these words; None if nothing is.

    It has to end with an exit code that its help names, and without a traceback. Where it is 2, the
    last line on stderr begins with the name of the command, and no other does: argparse prints the
    usage before it.
    """
    out, err = _stream(), _stream()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), limits():
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                code = main([str(word) for word in argv])
    except SystemExit as stop:
        code = stop.code
    except (Exception, Hang) as error:
        return Mutants.describe(error)
    err.flush()
    lines = err.buffer.getvalue().decode().splitlines()
    named = [line for line in lines if line.startswith("deltadiff")]
    if code not in CODES or any("Traceback" in line for line in lines):
        return f"exit code {code}: {lines[-3:]}"
    if code == 2 and (lines[-1:] != named or len(named[-1]) > 100_000):
        return f"stderr: {lines[-3:]}"
    return None


def _stream() -> io.TextIOWrapper:
    """A stream that takes what a file does: no halves of characters."""
    return io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)


@pytest.fixture
def no_training(monkeypatch):
    """Runs of `deltadiff finetune` end where training would begin, as by Ctrl-C."""

    def stop(*_, **__):
        raise Interrupted("nowhere")

    monkeypatch.setattr(run, "train", stop)


def attempt(mutants: Mutants, case: str, argv: Sequence[object]) -> None:
    """Run a command and note what is wrong with how it ends."""
    mutants.cases += 1
    told = problem(argv)
    mutants.check(case, told is None, told or "")
