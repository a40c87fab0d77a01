"""Plots of the records of `deltadiff bench`. Each PNG holds a digest of its records."""

import hashlib
import io
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from ..files import slug, write_bytes
from .fp8_accuracy import curve_records, draw_curves
from .report import VARIANT_NAMES

# Colour-blind readers can tell those of one plot apart too.
COLOURS = {
    "frozen": "#555555", "copy": "#555555", "deltadiff": "#0072b2", "deltadiff-fp32": "#56b4e9",
    "deltadiff-layers": "#56b4e9", "deltadiff-fp8": "#009e73",
    "eager": "#cc79a7", "peft-swapped": "#009e73", "peft": "#d55e00", "peft-bf16": "#e69f00",
    "peft-compiled": "#f0e442", "peft-alone": "#d55e00", "unsloth": "#cc79a7",
    "naive": "#d55e00", "addmm": "#e69f00", "torch-fused": "#009e73", "torch-foreach": "#cc79a7",
}  # fmt: skip
LEAST_POINTS = 3  # of a curve; a table shows fewer just as well
DIGEST = "Records"  # the text entry of the PNG that holds the digest of its records


class Plot(NamedTuple):
    """The content of a PNG; ``draw`` takes a matplotlib figure and the records."""

    draw: Callable[[object, Sequence[dict]], None]
    title: str
    records: list[dict]


def plots(records: Sequence[dict], folder: Path) -> dict[Path, Plot]:
    """The plots that the records hold enough for, by file: <kind>-<device>.png in ``folder``.

    Variants that failed are left out.
    """
    kinds = {
        "layer": (_draw_layer, "One LoRA linear layer, 4096 to 4096", _layer_records),
        "step": (_draw_step, "The optimizer step: achieved memory bandwidth", _step_records),
        "model": (_draw_model, "Training steps of a whole model", _model_records),
        "whole-step": (_draw_whole_step, "Speed and memory of whole training steps", _whole_steps),
        "fp8-accuracy": (draw_curves, "Fine-tuning in FP8 beside bf16", curve_records),
    }
    found = {}
    for gpu in dict.fromkeys(r["gpu"] for r in records):
        mine = [r for r in records if r["gpu"] == gpu]
        measured = [r for r in mine if "p50_ms" not in r or r["p50_ms"] is not None]
        for kind, (draw, title, select) in kinds.items():
            shown = select(measured)
            if shown:
                found[folder / f"{kind}-{slug(gpu)}.png"] = Plot(draw, f"{title} ({gpu})", shown)
    return found


def write_plots(records: Sequence[dict], folder: Path) -> list[Path]:
    """Draw the plots of ``records``; returns their files."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    found = plots(records, folder)
    for path, plot in found.items():
        figure = Figure(figsize=(11, 4.8), dpi=110, layout="constrained")
        canvas = FigureCanvasAgg(figure)
        figure.suptitle(plot.title)
        plot.draw(figure, plot.records)
        png = io.BytesIO()
        canvas.print_png(png, metadata={DIGEST: digest(plot.records)})
        write_bytes(path, png.getvalue())
    return list(found)


def stale_plots(records: Sequence[dict], folder: Path) -> list[Path]:
    """The files of plots that are missing or were made of other records."""
    from PIL import Image, UnidentifiedImageError

    def is_current(path: Path, shown: Sequence[dict]) -> bool:
        try:
            with Image.open(path) as image:
                return image.text.get(DIGEST) == digest(shown)
        except (FileNotFoundError, UnidentifiedImageError):
            return False

    found = plots(records, folder).items()
    return [path for path, plot in found if not is_current(path, plot.records)]


def digest(records: Sequence[dict]) -> str:
    """SHA-256 of all that the records say, whatever their order."""
    lines = sorted(json.dumps(r, sort_keys=True) for r in records)
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


# ------------------------------------------------------------------------ layer

LAYER_PANELS = (  # (the records that it shows, x axis, its label, title)
    ({"r": 16, "graph": True}, "M", "tokens", "rank 16, CUDA graph"),
    ({"M": 8192, "graph": False}, "r", "rank", "8192 tokens"),
)


def _curves(records: Sequence[dict], same: dict, key: str) -> list[dict]:
    """Forward + backward of 4096 to 4096 over ``key``; [] unless there are enough points."""
    chosen = [
        r
        for r in records
        if r["op"] == "lora_linear"
        and r["mode"] == "forward+backward"
        and (r["shape"]["K"], r["shape"]["N"]) == (4096, 4096)
        and all(r[k] == v if k in r else r["shape"][k] == v for k, v in same.items())
    ]
    return chosen if len({r["shape"][key] for r in chosen}) >= LEAST_POINTS else []


def _layer_records(records: Sequence[dict]) -> list[dict]:
    return [r for same, key, *_ in LAYER_PANELS for r in _curves(records, same, key)]


def _draw_layer(figure, records: Sequence[dict]) -> None:
    panels = [(_curves(records, same, key), key, *words) for same, key, *words in LAYER_PANELS]
    panels = [panel for panel in panels if panel[0]]
    for axes, (chosen, key, label, title) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        for variant in dict.fromkeys(r["variant"] for r in chosen):
            points = sorted(
                (r["shape"][key], r["over_floor"]) for r in chosen if r["variant"] == variant
            )
            style = {"linestyle": "--"} if variant == "frozen" else {"marker": "o"}
            style |= {"label": VARIANT_NAMES[variant], "color": COLOURS[variant]}
            axes.plot(*zip(*points, strict=True), **style)
        values = sorted({r["shape"][key] for r in chosen})
        axes.set_xscale("log", base=2)
        axes.set_xticks(values, [str(v) for v in values], rotation=45)
        axes.set_xlabel(label)
        axes.set_ylabel("time / time of the frozen layer (lower is better)")
        axes.set_title(f"forward + backward, {title}")
        axes.set_ylim(bottom=0.9)
        axes.grid(alpha=0.3)
    handles = {}
    for axes in figure.axes:
        handles |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    figure.legend(handles.values(), handles, loc="outside lower center", ncols=len(handles))


# ------------------------------------------------------------------------- step


def _step_records(records: Sequence[dict]) -> list[dict]:
    """The records of each case: those of its CUDA graph where it was measured as one."""
    ops = ("delta_update", "adamw_step", "step")
    chosen = [r for r in records if r["op"] in ops and r.get("bytes") and r["dtype"] != "float16"]
    graphs = {_step_label(r) for r in chosen if r["graph"]}
    return [r for r in chosen if r["graph"] or _step_label(r) not in graphs]


def _step_label(r: dict) -> str:
    if r["op"] == "adamw_step":
        return "AdamW" + ", yields the delta" * bool(r["delta"])
    what = "update of W" if r["op"] == "delta_update" else "whole step"
    model = f"{r['model']}: " if r.get("model") else ""
    return f"{model}{what}, {r['rounding'] or r['dtype']}"


def _draw_step(figure, records: Sequence[dict]) -> None:
    axes = figure.subplots()
    groups: dict[str, list[dict]] = {}
    for r in records:
        groups.setdefault(_step_label(r), []).append(r)
    places, ticks, place = [], {}, 0.0
    for label, group in groups.items():
        ticks[place + (len(group) - 1) / 2] = label
        places += [place + i for i in range(len(group))]
        place += len(group) + 0.8
    figure.set_size_inches(11, 1.6 + 0.2 * place)
    shown = [r for group in groups.values() for r in group]
    for variant in (name for name in VARIANT_NAMES if any(r["variant"] == name for r in shown)):
        mine = [(y, r) for y, r in zip(places, shown, strict=True) if r["variant"] == variant]
        speeds = [r["bytes"] / r["p50_ms"] / 1e9 for _, r in mine]
        heights = [y for y, _ in mine]
        style = {"color": COLOURS[variant], "label": VARIANT_NAMES[variant]}
        bars = axes.barh(heights, speeds, 0.95, **style)
        axes.bar_label(bars, fmt="%.2f", fontsize=7, padding=2)
    axes.set_yticks(list(ticks), list(ticks.values()))
    axes.invert_yaxis()
    axes.set_xlabel("TB/s of the bytes that have to move (higher is better)")
    axes.grid(axis="x", alpha=0.3)
    figure.legend(loc="outside right upper")


# ------------------------------------------------------------------------ model


def _model_records(records: Sequence[dict]) -> list[dict]:
    return [r for r in records if r["op"] == "model"]


def _model_label(r: dict) -> str:
    if r["variant"] == "frozen":
        return VARIANT_NAMES["frozen"]
    words = [f"{VARIANT_NAMES[r['variant']]}: {r['method']}", r["rounding"], f"on {r['targets']}"]
    return ", ".join(filter(None, words))


def _draw_model(figure, records: Sequence[dict]) -> None:
    peaks = any(r["peak_mib"] is not None for r in records)
    panels = figure.subplots(1, 1 + peaks, squeeze=False, sharey=True)[0]
    labels = list(dict.fromkeys(_model_label(r) for r in sorted(records, key=_model_order)))
    figure.set_size_inches(12, 1.6 + 0.42 * len(labels))
    units = ["thousand tokens / s (higher is better)", "peak GiB (lower is better)"]
    for axes, unit in zip(panels, units, strict=False):
        for on in (False, True):
            mine = [r for r in records if r["checkpointing"] is on]
            if unit.startswith("peak"):
                values = [(r["peak_mib"] or 0) / 1024 for r in mine]
            else:
                values = [r["shape"]["M"] / r["p50_ms"] for r in mine]
            places = [labels.index(_model_label(r)) + (0.2 if on else -0.2) for r in mine]
            name = "with gradient checkpointing" if on else "without gradient checkpointing"
            alpha = 0.5 if on else 1.0
            colours = [COLOURS[r["variant"]] for r in mine]
            bars = axes.barh(places, values, 0.4, color=colours, alpha=alpha)
            axes.bar_label(bars, fmt="%.1f", fontsize=8, padding=2)
            axes.barh([0], [0], color="#777777", alpha=alpha, label=name)
        axes.set_xlabel(unit)
        axes.margins(x=0.1)
        axes.grid(axis="x", alpha=0.3)
    panels[0].set_yticks(range(len(labels)), labels)
    panels[0].invert_yaxis()
    figure.legend(*panels[0].get_legend_handles_labels(), loc="outside upper right")
    r = records[0]
    figure.supxlabel(f"{r['model']}, {r['dtype']}, {r['batch']} x {r['sequence']} tokens a step")


def _model_order(r: dict) -> tuple:
    return r["variant"] != "frozen", r["targets"] == "all"


# ------------------------------------------------------------------------ whole steps


def _whole_steps(records: Sequence[dict]) -> list[dict]:
    return [r for r in records if r["op"] == "whole_step" and r["peak_mib"] is not None]


BASE_MARKERS = {"bf16": "o", "nf4": "^", "fp8": "D"}


def _draw_whole_step(figure, records: Sequence[dict]) -> None:
    """Tokens a second against memory: a point for each way to train, a panel for each model."""
    models = list(dict.fromkeys(r["model"] for r in records))
    panels = figure.subplots(1, len(models), squeeze=False)[0]
    figure.set_size_inches(1 + 7.5 * len(models), 6.5)
    for axes, model in zip(panels, models, strict=True):
        labels = []
        for r in (r for r in records if r["model"] == model):
            at = r["peak_mib"] / 1024, r["shape"]["M"] / r["p50_ms"]
            style = {"marker": BASE_MARKERS[r["base"]], "edgecolors": COLOURS[r["variant"]]}
            inside = "none" if r["checkpointing"] else COLOURS[r["variant"]]
            axes.scatter(*at, s=70, linewidths=1.5, facecolors=inside, **style)
            method = "" if r["method"] in (None, "LoRA") else f": {r['method']}"
            method += ", offloaded" * bool(r.get("offload"))
            labels.append((at, f"{VARIANT_NAMES[r['variant']]}{method}"))
        axes.set_title(f"{model}, {r['batch']} x {r['sequence']} tokens")
        axes.set_xlabel("peak GiB (less is better: left)")
        axes.set_ylabel("thousand tokens / s (more is better: up)")
        axes.margins(x=0.25, y=0.12)
        axes.grid(alpha=0.3)
        for base in dict.fromkeys(r["base"] for r in records):
            for inside, words in (("#777777", ""), ("none", ", gradient checkpointing")):
                style = {"marker": BASE_MARKERS[base], "edgecolors": "#777777"}
                axes.scatter([], [], facecolors=inside, label=f"{base} base{words}", **style)
        axes.legend(loc="upper left", fontsize=8)
        _label_points(figure, axes, labels)


def _label_points(figure, axes, labels: Sequence[tuple[tuple[float, float], str]]) -> None:
    """Write each label beside its point, where it covers no other label, no point, no legend."""
    figure.draw_without_rendering()  # so that the places of everything are known
    pixels = axes.transData.transform([at for at, _ in labels])
    taken = [axes.get_legend().get_window_extent()]
    size = figure.dpi / 72  # pixels in a point

    def covers(box) -> float:
        """How many things a box covers; leaving the axes counts for many."""
        points = sum(box.padded(4 * size).contains(*pixel) for pixel in pixels)
        outside = box.x0 < axes.bbox.x0 or box.x1 > axes.bbox.x1
        return points + sum(box.overlaps(other) for other in taken) + 9 * outside

    for at, text in labels:
        found = []
        for height in (3, -9, 12, -18, 21, -27):  # points above the point
            for side, align in ((8, "left"), (-8, "right")):
                label = axes.annotate(
                    text, at, (side, height), textcoords="offset points", fontsize=8, ha=align
                )
                box = label.get_window_extent()
                found.append((covers(box), len(found), label, box))
        *others, (_, _, _, box) = sorted(found, key=lambda each: each[:2], reverse=True)
        taken.append(box)
        for _, _, label, _ in others:
            label.remove()
