"""The report on swapped layers: what runs them, at which number of tokens, and why."""

import torch
from torch import nn

from deltadiff import swap_, swap_report
from deltadiff.layers.report import SwapReport, SwapRow
from deltadiff.ops import dispatch


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.odd = nn.Linear(16, 24), nn.Linear(16, 6)


def swapped() -> SwapReport:
    return swap_(Model(), r=2, target_modules=["wide", "odd"])


def test_a_layer_on_the_cpu():
    rows = swapped().rows
    chosen = dispatch.choose_path(torch.device("cpu"), torch.float32)
    assert {(row.path, row.kernels) for row in rows} == {(chosen.backend, chosen.backend)}
    assert [row.shape for row in rows] == [(24, 16), (6, 16)]


def test_calls_with_few_tokens_on_sm_90_are_told(monkeypatch):
    """The layer's backend is "hopper", but not every call runs on that kernel."""
    gpu = torch.device("cuda:0")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    dispatch.choose_path.cache_clear()
    monkeypatch.setattr(
        "deltadiff.layers.base_format.choose_path",
        lambda device, dtype, *layer: dispatch.choose_path(gpu, torch.bfloat16, *layer),
    )
    model = Model()
    swap_(model, r=2, target_modules=["wide", "odd"])
    report = swap_report(model)
    dispatch.choose_path.cache_clear()
    wide, odd = report.rows
    assert (wide.path, odd.path) == ("hopper", "triton")
    expected = (
        "triton few_tokens (up to 255 tokens), hopper (256 to 4,194,176 tokens), "
        "triton portable (more)"
    )
    assert wide.kernels == expected and odd.kernels == "triton portable"
    assert expected in str(report) and "6 x 16: TMA" in str(report)


def test_a_quantised_layer_runs_its_base_layers_product():
    model = Model()
    swap_(model, r=2, target_modules=["wide"])
    model.wide.weight = nn.Parameter(model.wide.weight.to(torch.int8), requires_grad=False)
    (row,) = swap_report(model).rows
    assert (row.path, row.kernels) == ("reference", "reference")
    assert "the base layer's own product" in row.reason


def test_the_printed_table():
    rows = (
        SwapRow("a", (2, 4), 1, "cpp", "CPU", kernels="cpp"),
        SwapRow("b", (4, 4), 1, "cpp", "CPU", "pair"),
    )
    text = str(SwapReport(rows, 8, 32, ("a note",)))
    head, first, second, *rest = text.splitlines()
    assert head.split("  ")[0] == "module" and "shares its pair in" in head and "runs on" in head
    assert first.startswith("a") and "cpp" in first and "pair" in second
    assert rest == ["2 layers swapped; 8 of 32 parameters are trained (25.00%)", "a note"]
