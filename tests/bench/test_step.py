"""`deltadiff bench step`: every variant of the step and of its parts runs."""

import pytest
import torch

from deltadiff.bench.adamw_step import adamw_step_case
from deltadiff.bench.delta_update import delta_update_case
from deltadiff.bench.step import VARIANTS, step_cases, whole_step_case
from deltadiff.bench.timing import compare
from deltadiff.checks import ROUNDINGS

CPU, BF16 = torch.device("cpu"), torch.bfloat16


def small_cases(graph):
    shapes = [(24, 16), (16, 40)]
    yield adamw_step_case(shapes, 4, True, graph)
    for rounding in ROUNDINGS:
        yield delta_update_case(shapes, 4, BF16, rounding, graph)
        yield whole_step_case(shapes, 4, BF16, rounding, graph)


def test_every_variant_of_the_step_runs():
    seen = set()
    for case in small_cases(graph=False):
        for r in compare(case, CPU, budget_s=0.01):
            assert r["note"] is None and r["p50_ms"] > 0
            seen.add(r["variant"])
    assert seen == set(VARIANTS)


def test_the_command_measures_both_parts_and_the_whole():
    ops = [case.fields["op"] for case in step_cases(CPU)]
    assert list(dict.fromkeys(ops)) == ["delta_update", "adamw_step", "step"]
    assert len({str(case) for case in step_cases(CPU)}) == len(ops) == 10


@pytest.mark.gpu
def test_every_variant_runs_as_a_cuda_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    for case in small_cases(graph=True):
        for r in compare(case, device, budget_s=0.01):
            assert r["note"] is None and r["host_ms"] > 0 and r["peak_mib"] is not None
