"""Where the tests of the operations run: the devices of this machine and the backends on each."""

from typing import NamedTuple

import torch

F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16


class OpPath(NamedTuple):
    """A backend on a device."""

    device: torch.device
    backend: str


def op_paths() -> dict[OpPath, tuple[torch.dtype, ...]]:
    """Every backend that this machine can run, with the dtypes that it does there."""
    cpu = torch.device("cpu")
    paths = {OpPath(cpu, "cpp"): (F32, BF16, F16), OpPath(cpu, "reference"): (F32, BF16)}
    if torch.cuda.is_available():
        gpu = torch.device("cuda", torch.cuda.current_device())
        paths[OpPath(gpu, "triton")] = (F32, BF16, F16)
    else:
        paths[OpPath(cpu, "triton")] = (F32, F16)  # Triton's interpreter gets bfloat16 wrong
    return paths
