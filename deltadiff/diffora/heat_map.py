"""`plot_gates`: the heat map of DiffoRA's gates, module types by layers (the paper's figure 2)."""

import io
import math
import os
from pathlib import Path

from ..errors import ArgumentError
from ..files import write_bytes
from .candidates import Candidates
from .gates import GateMatrix, Selection

CELL = 0.42  # inches; smaller cells get no number
WIDEST = 16  # inches that the cells of panels side by side may take
OWN, SHARED, MISSING = "#08306b", "#deebf7", "#bdbdbd"  # colours of cells


def plot_gates(
    path: str | os.PathLike,
    gates: GateMatrix,
    selection: Selection | None = None,
    title: str = "DiffoRA's gates",
) -> None:
    """Write a PNG of the gates, and beside them the modules that a selection kept.

    The colours start at 0, so that gates which are nearly equal look nearly equal.

    Args:
        path: the file to write.
        gates: the gates to draw.
        selection: a selection among the same candidates; None draws the gates alone.
        title: the text above the panels.

    Raises:
        ArgumentError: the selection is one among other candidates.
    """
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    candidates = gates.candidates
    if selection is not None and selection.candidates != candidates:
        raise ArgumentError("selection", "one among other candidates", "those of the gates")
    layers, types = len(candidates.layers), len(candidates.types)
    panels = 1 if selection is None else 2
    beside = panels * layers * CELL <= WIDEST  # otherwise one panel is above the other
    cell = min(CELL, WIDEST / layers)
    size = panels * layers * cell if beside else layers * cell, types * cell + 1.5
    figure = Figure(
        figsize=(max(4.5, size[0] + 3.2), size[1] * (1 if beside else panels)),
        dpi=130, layout="constrained",
    )  # fmt: skip
    rows, columns = (1, panels) if beside else (panels, 1)
    axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True).flatten()
    figure.suptitle(title)

    values = [[row[j] for row in gates.values] for j in range(types)]
    most = max(v for row in values for v in row if v is not None)
    table = [[math.nan if v is None else v for v in row] for row in values]
    image = axes[0].imshow(table, cmap="Blues", vmin=0, vmax=most, aspect="equal")
    bar = figure.colorbar(image, ax=axes[0], shrink=0.7, aspect=15)
    bar.ax.tick_params(labelsize=8)
    bar.set_label("gate", fontsize=8)
    axes[0].set_title("before" if selection else "a layer's gates add up to 1", fontsize=9)
    if cell >= CELL:
        for j, row in enumerate(values):
            for i, value in enumerate(row):
                if value is not None:
                    colour = "white" if value > 0.55 * most else "black"
                    text = f"{value:.2f}".removeprefix("0")
                    axes[0].text(i, j, text, ha="center", va="center", fontsize=8, color=colour)

    if selection is not None:
        kept = [[math.nan] * layers for _ in range(types)]
        for name, (i, j) in candidates.places.items():
            kept[j][i] = float(name in selection.selected)
        axes[1].imshow(kept, cmap=ListedColormap([SHARED, OWN]), vmin=0, vmax=1, aspect="equal")
        axes[1].set_title(f"after, ratio {selection.ratio:g}", fontsize=9)
        how = "at random" if selection.gates is None else "among the largest of its layer"
        marks = [
            Patch(color=OWN, label=f"selected ({how})"),
            Patch(color=SHARED, label="not selected"),
        ]
        if len(candidates.places) < layers * types:
            marks.append(Patch(color=MISSING, label="no such module"))
        figure.legend(handles=marks, loc="outside lower center", ncols=3, fontsize=8, frameon=False)

    names, stack = _layer_names(candidates)
    for ax in axes:
        ax.set_facecolor(MISSING)  # visible where a layer lacks a module
        ax.set_xticks(
            range(layers), names, fontsize=8, rotation=90 if max(map(len, names)) > 2 else 0
        )
        ax.set_yticks(range(types), candidates.types, fontsize=8)
        ax.set_xticks([i - 0.5 for i in range(1, layers)], minor=True)
        ax.set_yticks([j - 0.5 for j in range(1, types)], minor=True)
        ax.grid(which="minor", color="white", linewidth=1)
        ax.tick_params(which="both", length=0, labelbottom=True)
        ax.set_xlabel(f"layer ({stack})", fontsize=9)
    blob = io.BytesIO()
    FigureCanvasAgg(figure).print_png(blob)
    write_bytes(Path(path), blob.getvalue())


def _layer_names(candidates: Candidates) -> tuple[list[str], str]:
    """The labels of the columns, and the part of the layers' names that the labels leave out."""
    parts = [layer.rpartition(".") for layer in candidates.layers]
    stacks = list(dict.fromkeys(stack for stack, _, _ in parts))
    if len(stacks) == 1:
        return [number for _, _, number in parts], f"{stacks[0]}.*" if stacks[0] else "*"
    return list(candidates.layers), "of several stacks"
