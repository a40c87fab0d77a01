"""Figures of a run. Each can be read without the text around it."""

from collections.abc import Mapping
from pathlib import Path


def plot_loss(path: Path, results: Mapping[str, dict], title: str) -> None:
    """Training loss over steps of one or more runs, with the held-out figure before and after."""
    figure, axes = _figure()
    for colour, (name, result) in zip(_colours(len(results)), results.items(), strict=True):
        curve = result["loss_curve"]
        steps = range(1, len(curve) + 1)
        axes.plot(steps, curve, color=colour, alpha=0.25, linewidth=1)
        smooth = _running_mean(curve, max(1, len(curve) // 12))
        axes.plot(steps, smooth, color=colour, linewidth=2, label=f"{name}: {_gain(result)}")
    settings = next(iter(results.values()))["settings"]
    axes.set_xlabel(f"optimizer step ({settings['batch_size']} examples each)")
    squared = "mse" in next(iter(results.values()))["after"]
    axes.set_ylabel("training loss " + ("(squared error)" if squared else "(cross-entropy, nats)"))
    _finish(figure, axes, path, title, legend="thin: each step; thick: running mean")


def plot_similarity(path: Path, similarity: Mapping[str, Mapping[str, float]], title: str) -> None:
    """Cosine similarity of fine-tuned and original weights over the blocks (figure 3)."""
    figure, axes = _figure()
    for colour, (name, blocks) in zip(_colours(len(similarity)), similarity.items(), strict=True):
        axes.plot(
            [int(block) for block in blocks], list(blocks.values()), "o-", color=colour, label=name
        )
    axes.set_xlabel("block")
    axes.set_ylabel("cosine similarity of fine-tuned and original weights")
    _finish(figure, axes, path, title)


def _gain(result: dict) -> str:
    key = next(iter(result["before"]))
    name = {"nll_per_token": "loss a token", "mse": "squared error"}.get(key, key)
    return f"held-out {name} {result['before'][key]:.3f} → {result['after'][key]:.3f}"


def _figure():
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.8), layout="constrained")
    return figure, figure.add_subplot()


def _colours(count: int):
    """Told apart by colour-blind readers too, where a few are enough."""
    import matplotlib

    few = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")
    return (
        few[:count]
        if count <= len(few)
        else matplotlib.colormaps["turbo"].resampled(count)(range(count))
    )


def _finish(figure, axes, path: Path, title: str, legend: str | None = None) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    axes.set_title(title)
    axes.grid(alpha=0.3)
    axes.legend(title=legend, framealpha=0.9)
    FigureCanvasAgg(figure).print_png(path)


def _running_mean(values: list[float], width: int) -> list[float]:
    """Mean of the last ``width`` values at each place."""
    return [
        sum(values[max(0, i - width + 1) : i + 1]) / min(i + 1, width) for i in range(len(values))
    ]
