"""The same call gives the same bits: again and again, and with any number of threads."""

import pytest
import torch
from op_paths import BF16, F16, F32, OpPath
from repeated_calls import CALLS, same

REPEATS = 10


@pytest.mark.parametrize("op", CALLS)
@pytest.mark.check(short=1, long=25)
def test_repeats_are_bit_equal(path, dtype, op, seed, tally, request):
    interpreted = path.backend == "triton" and path.device.type == "cpu"
    repeats = REPEATS if request.config.option.check or not interpreted else 1
    run = CALLS[op](path, dtype, seed)
    expected = run()
    failures = sum(not same(run(), expected) for _ in range(repeats))
    where = f"{path.backend}-{path.device.type}"
    tally("repeats", op, repeats, failures, path=where, dtype=str(dtype)[6:])
    assert not failures


@pytest.mark.parametrize("dtype", [F32, BF16, F16], ids=str)
@pytest.mark.parametrize("op", ["delta_update", "adamw_step"])
def test_any_number_of_threads_gives_the_same_bits(dtype, op):
    """`lora_linear` is not among them: PyTorch's products depend on the number of threads."""
    run = CALLS[op](OpPath(torch.device("cpu"), "cpp"), dtype, 5, size=400)
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            found.append(run())
    finally:
        torch.set_num_threads(before)
    assert all(same(ours, found[0]) for ours in found[1:])
