"""benchmarks/sanitizers.py: which reports of racecheck are no findings, and what it runs."""

import importlib.util
from pathlib import Path

import pytest
import sanitizer_suite
import torch

ROOT = Path(__file__).parents[2]
KERNELS = ROOT / "kernels" / "lora_linear"
HEAD = "========= Error: Potential {kind} hazard detected at __shared__ 0x2e540 :\n"
WRITE = "=========     Write Thread ({writer},0,0) at {kernel}+0x17c0 in {write}\n"
READ = "=========     Read Thread ({reader},0,0) at {kernel}+0x3090 in {read}\n"
VALUE = "=========     Current Value : 0\n========= \n"


@pytest.fixture(scope="module")
def sanitizers():
    path = ROOT / "benchmarks" / "sanitizers.py"
    spec = importlib.util.spec_from_file_location("sanitizers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def place(file: str, text: str, named: str | None = None) -> str:
    """FILE:LINE of the first line that holds ``text``."""
    lines = (KERNELS / file).read_text().splitlines()
    return f"{named or file}:{next(i for i, line in enumerate(lines, 1) if text in line)}"


STORES = place("producer.py", "pipe.work.index(i).store(code)")
LOADS = place("consumer.py", "pipe.work.index(0).load(one)", named="hopper.py")
STARTS = place("hopper.py", "gl.warp_specialize([")
KERNEL = place("hopper.py", "def _lora_linear_hopper_kernel")
EXPLAINED = [
    {"writer": 351, "write": STORES, "reader": 0, "read": LOADS},
    {"writer": 31, "write": STARTS, "reader": 320, "read": KERNEL},
]


@pytest.mark.parametrize("report", EXPLAINED, ids=["work item", "what warps run"])
@pytest.mark.parametrize("kind, accesses", [("RAW", WRITE + READ), ("WAR", READ + WRITE)])
def test_what_is_explained_is_exactly_that(sanitizers, report, kind, accesses):
    def explained(accesses=accesses, **other):
        fields = {"kind": kind, "kernel": "_lora_linear_hopper_kernel", **report, **other}
        text = "calls: 94\n" + 2 * (HEAD + accesses + VALUE).format(**fields)
        first, second = map(sanitizers.hazard_of, sanitizers.REPORT.split(text)[1:])
        assert sanitizers.explains(first) == sanitizers.explains(second)
        return sanitizers.explains(first)

    assert explained()
    assert not explained(kind="WAW")
    assert not explained(WRITE + WRITE) and not explained("")
    assert not explained(kernel="delta_update_kernel")
    assert not explained(write=place("producer.py", "it += 1"))
    assert not explained(read=place("consumer.py", "y_buf.store("))
    if report["write"] == STARTS:
        assert not explained(reader=32)  # one of the warps that multiply
        assert not explained(writer=320)


def test_hazards_are_counted_once(sanitizers):
    """The summary counts races too, each of which sums up hazards that were printed before."""
    report, strange = ({"kind": "RAW", "kernel": "_lora_linear_hopper_kernel", **r} for r in (
        EXPLAINED[0], {**EXPLAINED[0], "read": place("consumer.py", "y_buf.store(")}
    ))  # fmt: skip
    hazard = HEAD + WRITE + READ + VALUE
    race = "========= Error: Race reported between Read access at k+0x3090 in hopper.py:235\n"
    race += "=========     and Write access at k+0x1220 in producer.py:37 [3 hazards]\n========= \n"
    end = "========= RACECHECK SUMMARY: {0} hazards displayed ({0} errors, 0 warnings)\n"
    text = 3 * hazard.format(**report) + race
    assert sanitizers.count_hazards(text + end.format(4)) == (0, 3)
    assert sanitizers.count_hazards(text + end.format(5)) == (1, 3)  # one was not printed
    text += hazard.format(**strange)
    assert sanitizers.count_hazards(text + end.format(5)) == (1, 3)
    assert sanitizers.count_hazards("")[0] > 0


def test_the_suite_calls_every_operation_of_a_cpu():
    assert sanitizer_suite.run_all(torch.device("cpu")) > 60
