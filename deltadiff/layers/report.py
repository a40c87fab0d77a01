"""`swap_report`: which kernels run each swapped layer, and why."""

from dataclasses import dataclass

from torch import nn

from ..text import align_columns
from .coverage import Coverage, find_coverage
from .fp8 import describe_products
from .lean.swap import LeanRow, in_words, lean_rows
from .linear import is_peft_model
from .lora_layers import lora_layers
from .matrices import size_of


@dataclass(frozen=True)
class SwapRow:
    """One swapped module.

    Attributes:
        module: its name in the model.
        shape: of its weight, (out, in).
        path, reason: the backend that was chosen for it, and why.
        shares: the name of the group of layers that train one pair together; empty for a layer
            with a pair of its own.
        kernels: which kernels run it at which number of tokens, in words.
    """

    module: str
    shape: tuple[int, int]
    r: int
    path: str
    reason: str
    shares: str = ""
    kernels: str = ""


@dataclass(frozen=True)
class SwapReport:
    """What `swap_` did. It prints as a table, with a few lines on the whole model below.

    Attributes:
        rows: the layers that have a low-rank pair.
        trainable, total: how many parameters train now, and how many there are.
        notes: more lines.
        coverage: how much of the model's weight is adapted, and why the rest is not.
        lean: the blocks that keep less for the backward pass (``swap_(lean=True)``), and those that
            do not, with the reason.
    """

    rows: tuple[SwapRow, ...]
    trainable: int
    total: int
    notes: tuple[str, ...] = ()
    coverage: Coverage | None = None
    lean: tuple[LeanRow, ...] = ()

    def __str__(self) -> str:
        cells = [["module", "out x in", "r", "runs on", "reason"]]
        for row in self.rows:
            shape = f"{row.shape[0]} x {row.shape[1]}"
            cells.append([row.module, shape, str(row.r), row.kernels or row.path, row.reason])
        if any(row.shares for row in self.rows):
            shares = ["shares its pair in", *(row.shares for row in self.rows)]
            for line, group in zip(cells, shares, strict=True):
                line.insert(3, group)
        share = self.trainable / max(1, self.total)
        summary = (
            f"{len(self.rows)} layers swapped; {self.trainable:,} of {self.total:,} parameters "
            f"are trained ({share:.2%})"
        )
        lines: list[str] = []
        if self.coverage is not None:
            lines, adapted = self.coverage.lines(), self.coverage.percent(self.coverage.adapted)
            summary += f"; {adapted} of the model's weight is adapted"
        return "\n".join([align_columns(cells), summary, *lines, *in_words(self.lean), *self.notes])


def swap_report(model: nn.Module) -> SwapReport:
    """Which kernels run each swapped layer of ``model`` now, and why; and what is not swapped."""
    rows, decoded = [], []
    layers = {name: layer for name, layer in lora_layers(model).items() if layer.active}
    for name, layer in layers.items():
        shape = (layer.out_features, layer.in_features)
        chosen, group = layer.dispatch, layer.share_group or ""
        row = chosen.backend, chosen.reason, group, chosen.in_words()
        rows.append(SwapRow(name, shape, layer.r, *row))
        if chosen.backend not in ("fp8", "peft"):
            decoded.append(getattr(layer, "base_layer", layer.holder))
    sizes = [(size_of(p), p.requires_grad) for p in model.parameters()]
    notes = describe_products(decoded)
    if is_peft_model(model):
        from .peft.fuse import describe_others

        notes += describe_others(model)
    return SwapReport(
        tuple(rows),
        trainable=sum(n for n, trains in sizes if trains),
        total=sum(n for n, _ in sizes),
        notes=tuple(notes),
        coverage=find_coverage(model),
        lean=tuple(lean_rows(model)),
    )
