"""In the sm_90 kernel, a thread that arrives at a barrier speaks for all of its warp or its group.

One thread arrives, but all threads have stored the work item that the barrier announces, or have
read the one whose stage it gives back. That is no race, because each arrival stands behind a
synchronisation of the threads that it speaks for: of the loading warp (`bar.warp.sync`), or of the
warps that multiply (`bar.sync`). A race checker that follows the arriving thread alone cannot see
this; the compiled code shows it.
"""

import re
import sys

import pytest
from cubins import compile_instead, records_of

# Whatever orders memory, or touches memory that threads share.
ORDERED = re.compile(r"(?:^|\s)(ld|st|atom|red|bar|barrier|mbarrier|cp|wgmma|fence)\.")
ALL_THREADS = "barrier.sync \t1;"
OFFSET = re.compile(r"\+(\d+)\]")
NUM_WARPS = (
    8  # that multiply; `deltadiff.kernels.lora_linear.hopper` is not importable without Gluon
)
GROUP_SYNC = re.compile(r"(bar\.warp\.sync|bar\.sync)\s")


def steps_of(ptx: str) -> list[str]:
    """The instructions that matter here, in order, without comments and source lines."""
    lines = (line.strip() for line in ptx.splitlines())
    return [line for line in lines if not line.startswith(("//", ".loc")) and ORDERED.search(line)]


def print_steps(capability: int) -> None:
    """Print, as one JSON line for each kernel, its steps; a forward and a backward pass."""
    import json

    import torch

    from deltadiff.kernels.lora_linear import hopper_launch

    def seen(name, kernel):
        if "hopper" in name:
            print(json.dumps(steps_of(kernel.asm["ptx"])), flush=True)

    compile_instead(capability, seen)
    bf16 = torch.bfloat16
    x, weight, dy = (torch.empty(s, dtype=bf16) for s in ((512, 256), (384, 256), (512, 384)))
    a, b = torch.empty(16, 256, dtype=bf16), torch.empty(384, 16, dtype=bf16)
    _, s = hopper_launch.lora_linear_fwd(x, weight, a, b, 2.0, None, None)
    needs = [True] * 3 + [False]
    hopper_launch.lora_linear_bwd(dy, x, weight, a, b, s, 2.0, None, needs)


@pytest.fixture(scope="module")
def kernels():
    return records_of(__file__, "90")


def test_what_warps_run_is_handed_over_across_a_barrier_of_all(kernels):
    """`warp_specialize`: its bytes are stored before, and loaded after, such a barrier.

    All threads meet at another one after the loads, which comes before the next store.
    """
    for steps in kernels:
        loads = [i for i, step in enumerate(steps) if step.startswith("ld.shared.b8")]
        assert loads
        offsets = {int(OFFSET.search(steps[i])[1]) for i in loads}
        (first,) = {offset + NUM_WARPS for offset in offsets}  # each warp has a byte of its own
        stores = [
            i for i, step in enumerate(steps)
            if step.startswith("st.shared") and f"+{first}]" in step
        ]  # fmt: skip
        assert len(stores) == 2  # it starts the warps, and ends them
        assert {steps[i - 1] for i in loads} == {steps[i + 1] for i in stores} == {ALL_THREADS}
        assert {steps[i + 1] for i in loads} == {steps[stores[0] + 2]} == {ALL_THREADS}


def test_each_arrival_stands_behind_a_synchronisation(kernels):
    assert len(kernels) == 2
    for steps in kernels:
        before = [old for old, new in zip(steps, steps[1:], strict=False) if "arrive" in new]
        assert len(before) > 5
        assert [step for step in before if not GROUP_SYNC.match(step)] == []


if __name__ == "__main__":
    print_steps(int(sys.argv[1]))
