"""Figures of a run. Each can be read without the text around it."""

from collections.abc import Mapping
from pathlib import Path

COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by colour-blind readers too


def plot_loss(path: Path, results: Mapping[str, dict], title: str) -> None:
    """Training loss over steps of one or more runs, with the held-out figure before and after."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, result) in zip(COLOURS, results.items(), strict=False):
        curve = result["loss_curve"]
        steps = range(1, len(curve) + 1)
        axes.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
        smooth = _running_mean(curve, max(1, len(curve) // 12))
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{name}: {_gain(result)}")
    settings = next(iter(results.values()))["settings"]
    axes.set_xlabel(f"optimizer step ({settings['batch_size']} examples each)")
    axes.set_ylabel("training loss (cross-entropy, nats)")
    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(title="thin: each step; thick: running mean", framealpha=0.9)
    FigureCanvasAgg(figure).print_png(path)


def _gain(result: dict) -> str:
    key = "accuracy" if "accuracy" in result["after"] else "nll_per_token"
    name = {"nll_per_token": "loss a token"}.get(key, key)
    return f"held-out {name} {result['before'][key]:.3f} → {result['after'][key]:.3f}"


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last ``width`` values at each place."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
