"""Compiled kernels without a GPU: the process that makes them, and what is in them."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path


def records_of(script: str, argument: str, **variables: str) -> list[dict]:
    """The JSON lines that a script prints, in a process in which Triton compiles.

    These ``variables`` are added to its environment. It finds this folder's modules, as tests do.
    """
    env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    env |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parent), **variables}
    command = [sys.executable, script, argument]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def cuobjdump(cubin: bytes, option: str) -> str:
    """What Triton's copy of that tool says about a kernel, for an option such as "-elf"."""
    from triton.backends import nvidia

    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        tool = Path(nvidia.__file__).parent / "bin" / "cuobjdump"
        command = [tool, option, file.name]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout
