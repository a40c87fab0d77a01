"""Compares the operations with float64, beside eager PyTorch on the same inputs.

`deltadiff.verify.tolerance` has the rule. The inputs are random, and every term is so large that
leaving one out shows: an update is as large as its weight, a low-rank branch as its base.
"""

import secrets
from collections.abc import Sequence

import torch

from ..devices import find_device
from ..errors import ArgumentError
from ..ops.dispatch import choose_path
from .adamw_step import check_adamw_step
from .decode_4bit import check_decode_4bit
from .decode_fp8 import check_decode_fp8
from .delta_update import check_delta_update
from .gated_mlp import check_gated_mlp
from .lora_linear import check_lora_linear
from .lora_linear_fp8 import check_lora_linear_fp8
from .tolerance import Bench, Row


def run(
    device: str | torch.device,
    ops: Sequence[str] | None = None,
    backend: str | None = None,
    quick: bool = False,
    seed: int | None = None,
) -> tuple[list[Row], bool]:
    """Check operations on ``device``.

    Args:
        device: "cpu", "cuda", "cuda:1".
        ops: names from `OPERATIONS`; None is all of them.
        backend: None checks the backend that `choose_path` takes. A name asks for one, and cases
            that it does not take are skipped. float64 goes to the reference in any case.
        quick: small shapes only, and no factors or moments in float32 beside 16-bit tensors.
        seed: determines the inputs; None draws a new one.

    Returns:
        The rows, and whether at least one check ran and all that ran passed.

    Raises:
        ArgumentError: no such device or operation.
        BackendUnavailableError: ``backend`` cannot run on ``device``.
    """
    bench = Bench(
        find_device(device), backend, quick, secrets.randbits(31) if seed is None else seed
    )
    # This raises where the backend runs nothing here.
    choose_path(bench.device, torch.bfloat16, backend, (16, 16, 1), fp8_block=(128, 128))
    rows = []
    for op in OPERATIONS if ops is None else ops:
        if op not in OPERATIONS:
            raise ArgumentError("ops", repr(op), f"None or names from {', '.join(OPERATIONS)}")
        rows += OPERATIONS[op](bench)
    checked = [row.ok for row in rows if row.ok is not None]
    return rows, bool(checked) and all(checked)


OPERATIONS = {
    "lora_linear": check_lora_linear,
    "decode_4bit": check_decode_4bit,
    "decode_fp8": check_decode_fp8,
    "lora_linear_fp8": check_lora_linear_fp8,
    "gated_mlp": check_gated_mlp,
    "delta_update": check_delta_update,
    "adamw_step": check_adamw_step,
}
