"""Compiled kernels without a GPU: the process that makes them, and what is in them."""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path


class StandInDriver:
    """The part of a driver that Triton asks for when it compiles."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self):
        return self.target

    def get_current_device(self):
        return 0

    def get_current_stream(self, device=0):
        return 0


def compile_instead(capability: int, seen: Callable) -> None:
    """From now on, launches in this process compile for a GPU of this capability and do not run.

    ``seen(name, kernel)`` gets each kernel that a launch asks for.
    """
    from triton.runtime import driver
    from triton.runtime.jit import JITFunction

    from deltadiff.kernels.lora_linear import hopper_launch
    from deltadiff.kernels.lora_linear_fp8 import launch as fp8_launch
    from deltadiff.kernels.runtime import gpu

    driver.set_active(StandInDriver(capability))
    gpu.capability = lambda device: divmod(capability, 10)
    hopper_launch.multiprocessors = fp8_launch.multiprocessors = lambda device: 132
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        seen(self.fn.__name__.strip("_"), kernel)

    JITFunction.run = compile_only


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
