"""Figures of runs, as PNG files. Each can be understood without the text around it."""

import io
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

from ..files import write_bytes
from .tasks.base import Task


def plot_loss(path: Path, results: Mapping[str, dict], title: str, task: Task | type[Task]) -> None:
    """Training loss over the steps of one or more runs, with the headline metric before and after.

    ``results``: the name of each run, and what its result.json holds. ``task`` is that of all runs.
    """
    figure, axes = _figure()
    for colour, (name, result) in zip(_colours(len(results)), results.items(), strict=True):
        curve = result["loss_curve"]
        steps = range(1, len(curve) + 1)
        axes.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
        smooth = _running_mean(curve, max(1, len(curve) // 12))
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{name}: {_gain(result, task)}")
    settings = next(iter(results.values()))["settings"]
    axes.set_xlabel(f"optimizer step ({settings['batch_size']} examples each)")
    axes.set_ylabel(f"training loss ({task.loss_axis})")
    _finish(figure, axes, path, title, legend="thin: each step; thick: running mean")


def plot_metric_curve(
    path: Path, before: Mapping[str, float], curve: list[Mapping[str, float]], title: str
) -> None:
    """One panel for each metric: its held-out value over the steps."""
    figure, panels = _panels(len(before), (1 + 3.4 * len(before), 4))
    for axes, metric in zip(panels, before, strict=True):
        points = [(0, before[metric]), *((c["step"], c[metric]) for c in curve if metric in c)]
        axes.plot(*zip(*points, strict=True), "o-", color=_colours(1)[0])
        axes.set_xlabel("optimizer step")
        axes.set_ylabel(f"held-out {metric}")
        axes.grid(alpha=0.3)
    _save(figure, path, title)


def plot_similarity(path: Path, similarity: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Cosine similarity of fine-tuned and original weights over the blocks (figure 3)."""
    figure, axes = _figure()
    for colour, (name, blocks) in zip(_colours(len(similarity)), similarity.items(), strict=True):
        axes.plot(
            [int(block) for block in blocks], list(blocks.values()), "o-", color=colour, label=name
        )
    axes.ticklabel_format(useOffset=False)
    axes.set_xlabel("block")
    axes.set_ylabel("cosine similarity of fine-tuned and original weights")
    _finish(figure, axes, path, title)


def plot_metrics(path: Path, values: Mapping[str, Mapping[str, list[float]]], title: str) -> None:
    """One panel for each metric: mean, standard deviation and every seed of each method."""
    methods = list(values)
    metrics = list(dict.fromkeys(m for found in values.values() for m in found))
    size = (2 + 2.6 * len(metrics), 1.5 + 0.32 * len(methods))
    figure, panels = _panels(len(metrics), size, sharey=True)
    for axes, metric in zip(panels, metrics, strict=True):
        for place, method in enumerate(methods):
            seeds = values[method].get(metric, [])
            if seeds:
                axes.plot(seeds, [place] * len(seeds), ".", color="0.6", zorder=1)
                axes.errorbar(
                    statistics.fmean(seeds), place, xerr=_deviation(seeds), fmt="o", capsize=3,
                    color="#0072b2",
                )  # fmt: skip
        axes.set_xlabel(metric)
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(methods)), methods)
    panels[0].invert_yaxis()
    _save(figure, path, f"{title}\ngrey: each seed; blue: mean and standard deviation")


def plot_differences(
    path: Path,
    differences: Mapping[str, Sequence[Mapping]],
    title: str,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """A line for each pair, by how much the first is better; a panel for each key.

    ``differences`` are records with the entries pair, gain, low, high, metric and diverged, by
    the title of their panel. ``metadata`` is what the file holds beside the picture.
    """
    pairs = list(dict.fromkeys(r["pair"] for found in differences.values() for r in found))
    size = (4 + 3.4 * len(differences), 2 + 0.34 * len(pairs))
    figure, panels = _panels(len(differences), size, sharey=True)
    blue, orange, _, _ = _colours(4)
    for axes, (name, found) in zip(panels, differences.items(), strict=True):
        for r in found:
            place, decided = pairs.index(r["pair"]), r["low"] > 0 or r["high"] < 0
            colour = (blue if r["gain"] > 0 else orange) if decided else "0.5"
            axes.plot([r["low"], r["high"]], [place, place], color=colour, linewidth=2)
            marker = "X" if r["diverged"] else "o"
            axes.plot([r["gain"]], [place], marker, color=colour, markersize=8)
        axes.axvline(0, color="black", linewidth=1)
        axes.set_title(name, fontsize="medium")
        axes.set_xlabel(
            f"\N{LEFTWARDS ARROW} worse   {found[0]['metric']}   better \N{RIGHTWARDS ARROW}"
        )
        axes.grid(alpha=0.3)
    panels[0].set_yticks(range(len(pairs)), pairs)
    panels[0].set_ylim(len(pairs) - 0.5, -0.5)
    legend = (
        "dot: mean difference; line: 95 % interval; blue: better, orange: worse; "
        "grey: not decided; cross: some runs diverged"
    )
    _save(figure, path, f"{title}\n{legend}", metadata)


def plot_sweep(
    path: Path, name: str, values: Mapping[str, Mapping[float, Mapping[str, list[float]]]],
    title: str,
) -> None:  # fmt: skip
    """One panel for each metric: mean and standard deviation over the swept value, by method."""
    metrics = list(dict.fromkeys(m for xs in values.values() for v in xs.values() for m in v))
    figure, panels = _panels(len(metrics), (1 + 3.4 * len(metrics), 4))
    for axes, metric in zip(panels, metrics, strict=True):
        for colour, (method, found) in zip(_colours(len(values)), values.items(), strict=True):
            xs = [x for x in sorted(found) if metric in found[x]]
            seeds = [found[x][metric] for x in xs]
            axes.errorbar(
                xs, list(map(statistics.fmean, seeds)), yerr=list(map(_deviation, seeds)),
                fmt="o-", capsize=3, color=colour, label=method,
            )  # fmt: skip
        axes.set_xlabel(name)
        axes.set_ylabel(metric)
        axes.grid(alpha=0.3)
    handles, names = panels[0].get_legend_handles_labels()
    figure.legend(handles, names, loc="outside lower center", ncols=len(names))
    _save(figure, path, title)


def plot_curves(
    path: Path, curves: Mapping[str, list[list[float]]], title: str, x: str, y: str, *,
    smooth: bool = True,
) -> None:  # fmt: skip
    """One line for each method: the mean over its seeds; ``smooth`` makes it a running mean."""
    figure, axes = _figure()
    for colour, (name, seeds) in zip(_colours(len(curves)), curves.items(), strict=True):
        mean = list(map(statistics.fmean, zip(*seeds, strict=True)))
        mean = _running_mean(mean, max(1, len(mean) // 12)) if smooth else mean
        axes.plot(range(smooth, len(mean) + smooth), mean, color=colour, label=name)
    axes.ticklabel_format(useOffset=False)
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    figure.set_size_inches(9.5, 5.5)
    _finish(figure, axes, path, title, legend="mean over the seeds", beside=True)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _gain(result: dict, task: Task | type[Task]) -> str:
    key = next(iter(task.metric_titles))
    if key not in result["before"] or key not in result["after"]:
        return f"held-out {task.headline} not known"
    return f"held-out {task.headline} {result['before'][key]:.3f} → {result['after'][key]:.3f}"


def _figure():
    figure, (axes,) = _panels(1, (8, 4.8))
    return figure, axes


def _panels(count: int, size: tuple[float, float], sharey: bool = False):
    """A figure, and its panels side by side."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=size, layout="constrained")
    return figure, figure.subplots(1, count, squeeze=False, sharey=sharey)[0]


def _colours(count: int):
    """Colours of lines. Up to four of them can be told apart by colour-blind readers too."""
    import matplotlib

    few = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    return (
        few[:count]
        if count <= len(few)
        else matplotlib.colormaps["turbo"].resampled(count)(range(count))
    )


def _finish(
    figure, axes, path: Path, title: str, legend: str | None = None, beside: bool = False
) -> None:
    axes.grid(alpha=0.3)
    place = {"loc": "upper left", "bbox_to_anchor": (1, 1)} if beside else {}
    axes.legend(title=legend, framealpha=0.9, fontsize="small", **place)
    _save(figure, path, title)


def _save(figure, path: Path, title: str, metadata: Mapping[str, str] | None = None) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    title = title.replace("$", r"\$")  # a name of a file, and no formula
    figure.suptitle(title, fontsize="medium", wrap=True)
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata=metadata)
    write_bytes(path, image.getvalue())


def _running_mean(values: list[float], width: int) -> list[float]:
    """The mean of the last ``width`` values at each place."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
