"""`plot_courses`: the measured loss of each kind of draws beside the bounds of theorems 1 and 2."""

import io
import math
from collections.abc import Sequence
from pathlib import Path

from ...files import write_bytes
from .experiment import FROZEN, Course, Setting

COLOURS = {"with the selection": "#08519c", "without it": "#a63603"}


def plot_courses(path: Path, courses: Sequence[tuple[Setting, Course, Course]]) -> None:
    """Write a PNG with a panel for each setting: its courses with and without the selection."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = len(FROZEN)
    columns = -(-len(courses) // rows)
    figure = Figure(figsize=(2.9 * columns, 2.5 * rows), dpi=110, layout="constrained")
    panels = figure.subplots(rows, columns, sharex=True, sharey=True, squeeze=False).flatten()
    for axes, (setting, *both) in zip(panels, courses, strict=False):
        for (name, colour), course in zip(COLOURS.items(), both, strict=True):
            bounds = [math.exp(-course.rate * t) for t in course.times]
            axes.plot(course.times, course.errors, color=colour, label=name)
            axes.plot(course.times, bounds, color=colour, linestyle=":", label=f"bound {name}")
        axes.set_yscale("log")
        axes.set_ylim(1e-4, 1.5)
        axes.set_title(f"{setting.frozen}, {setting.data},\n{setting.selection}", fontsize=8)
        axes.tick_params(labelsize=7)
        axes.grid(alpha=0.3)
    for axes in panels[-columns:]:
        axes.set_xlabel("time (steps times their size)", fontsize=7)
    figure.supylabel("squared error over that at the start", fontsize=9)
    handles, labels = panels[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=8, frameon=False)
    figure.suptitle("One draw of each kind: the loss of equation 3's network beside exp(-lambda t)")
    blob = io.BytesIO()
    FigureCanvasAgg(figure).print_png(blob)
    write_bytes(path, blob.getvalue())
