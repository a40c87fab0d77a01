"""What must hold for a model of PEFT that `swap_` made faster, beside the same one unswapped."""

import warnings
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn

from deltadiff import swap_
from deltadiff.layers import fused_branch
from deltadiff.layers.peft.fuse import tuner_layers
from deltadiff.layers.peft.fused_linear import Fused
from deltadiff.layers.report import SwapReport


@contextmanager
def fused_calls(model: nn.Module) -> Iterator[Counter[str]]:
    """How often each layer of ``model`` is one call of `lora_linear` in this block, by its name."""
    names = {m: name for name, m in model.named_modules()}
    counts: Counter[str] = Counter()
    running: list[str] = []
    forward, multiply = Fused.forward, fused_branch.lora_linear

    def named_forward(self, *args, **kwargs):
        running.append(names.get(self, "?"))
        try:
            return forward(self, *args, **kwargs)
        finally:
            running.pop()

    def counted(*args, **kwargs):
        counts[running[-1]] += 1
        return multiply(*args, **kwargs)

    with mock.patch.object(Fused, "forward", named_forward):
        with mock.patch.object(fused_branch, "lora_linear", counted):
            yield counts


def swap_quietly(model: nn.Module, **options) -> SwapReport:
    """`swap_` without its warning that no layer became faster, which some cases are about."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no layer of this model became faster")
        return swap_(model, **options)


def facts_of(model: nn.Module) -> dict[str, object]:
    """What `swap_` leaves as it is: parameters, buffers, modules, what trains, the state's keys.

    PEFT makes new parameters for an nn.MultiheadAttention whenever its modules are listed.
    """
    return {
        "parameters": {
            n: (p.data_ptr() if ".mha." in n else id(p), p.requires_grad)
            for n, p in model.named_parameters()
        },
        "buffers": {n: id(b) for n, b in model.named_buffers()},
        "modules": {n: (id(m), m.training, repr(m)) for n, m in model.named_modules()},
        "state": list(model.state_dict()),
    }


def run(model: nn.Module, x: Tensor, output_of, **arguments) -> tuple[Tensor, dict[str, Tensor]]:
    """The output, and the gradients of the sum of its squares by parameter."""
    model.zero_grad()
    torch.manual_seed(3)
    y = output_of(model, x, **arguments)
    if y.requires_grad:
        y.double().square().sum().backward()
    return y.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def assert_equal_runs(one: tuple, other: tuple) -> None:
    """Both runs are in float64; outputs and gradients are equal to 1e-12 of the largest of each."""
    (y, grads), (z, others) = one, other
    assert y.dtype == torch.float64 and list(grads) == list(others)
    for wanted, found in (({"y": y}, {"y": z}), (grads, others)):
        largest = max((t.abs().max().item() for t in wanted.values() if t.numel()), default=0.0)
        for name, t in wanted.items():
            differ = (t - found[name]).abs().max().item() if t.numel() else 0.0
            assert differ <= 1e-12 * max(1.0, largest), name


def flat(grads: dict[str, Tensor]) -> Tensor:
    """All gradients in one vector, in float64."""
    return torch.cat([g.double().flatten() for g in grads.values()])


def files_of(folder: Path) -> dict[str, bytes]:
    """The content of each file below a folder; a README tells names of classes alone."""
    paths = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return {str(path.relative_to(folder)): path.read_bytes() for path in paths}


def layers_named(model: nn.Module, report: SwapReport) -> dict[str, str]:
    """For each layer of PEFT the path that the report names: "peft" for PEFT's own forward."""
    rows = {row.module.partition("[")[0]: row.path for row in report.rows}
    left_out = sum(int(note.split()[0]) for note in report.notes)
    layers = tuner_layers(model)
    idle = [name for name, m in layers.items() if isinstance(m, Fused) and name not in rows]
    others = [name for name, m in layers.items() if not isinstance(m, Fused)]
    assert left_out == len(others) + len(idle), f"{idle} and {others} beside {report.notes}"
    return rows | dict.fromkeys(others + idle, "peft")


def input_of(dtype=torch.float32, rows=6):
    """Rows of 64 numbers, the same in every call."""
    return torch.randn(rows, 64, generator=torch.Generator().manual_seed(3)).to(dtype)


def passes(model, x):
    """The output and all gradients of a model, by name."""
    x = x.detach().requires_grad_()
    model.zero_grad()
    y = model(x)
    y.float().square().sum().backward()
    grads = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), "x": x.grad, **grads}
