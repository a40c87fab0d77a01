"""What the records of benchmarks/fp8_accuracy.py say: tables, verdicts and a picture."""

import statistics
from collections.abc import Sequence
from typing import NamedTuple

from ..text import markdown_table

EVERY = 10  # steps that a point of a loss curve is the mean of
PLAIN = "bf16"  # the base that the others are compared with
COLOURS = {
    PLAIN: "#0072b2", "FP8 decoded, block": "#e69f00", "FP8, tensor": "#d55e00",
    "FP8, block": "#009e73",
}  # fmt: skip


class Verdict(NamedTuple):
    """How the runs over a base ended, beside those over bf16 with the same seeds.

    Attributes:
        mean, deviation: of the value over the seeds; None for no deviation of one seed.
        difference: the mean of the differences from bf16.
        within: whether it is no more than bf16's own deviation over the seeds; None where that is
            not known.
    """

    mean: float
    deviation: float | None
    difference: float
    within: bool | None


def values(runs: Sequence[dict], what: str) -> dict[str, dict[int, float]]:
    """Of each base and seed "final_loss", or a held-out metric; left out where a run diverged."""
    found: dict[str, dict[int, float]] = {}
    for r in runs:
        value = r["final_loss"] if what == "final_loss" else r["heldout"].get(what)
        if value is not None:
            found.setdefault(r["base"], {})[r["seed"]] = value
    return found


def verdict(found: dict[str, dict[int, float]], base: str) -> Verdict | None:
    """The verdict on a base, from `values`; None where no seed has a value over it and bf16."""
    mine, plain = found.get(base, {}), found.get(PLAIN, {})
    common = mine.keys() & plain.keys()
    if not common:
        return None
    difference = statistics.fmean(mine[seed] - plain[seed] for seed in common)
    limit = _deviation(plain.values())
    within = None if limit is None or len(common) < 2 else abs(difference) <= limit
    return Verdict(statistics.fmean(mine.values()), _deviation(mine.values()), difference, within)


def _deviation(numbers) -> float | None:
    numbers = list(numbers)
    return statistics.stdev(numbers) if len(numbers) > 1 else None


# --------------------------------------------------------------------------------- tables


def tables(records: Sequence[dict]) -> str:
    """For each model and text: how the runs ended, errors of layers, and of the formats of dy."""
    parts = []
    for title, found in _measurements(records).items():
        of = {part: [r for r in found if r["part"] == part] for part in ("run", "layer", "dy")}
        parts += [f"{title}:", _runs_table(of["run"])]
        if of["layer"]:
            parts += ["Relative errors of layers, against float64:", _layer_table(of["layer"])]
        if of["dy"]:
            parts += ["Relative errors of dx by the format of dy:", _format_table(of["dy"])]
    return "\n\n".join(parts)


def _measurements(records: Sequence[dict]) -> dict[str, list[dict]]:
    """The records of each model, text and way to compute, by their title."""
    found: dict[str, list[dict]] = {}
    for r in records:
        title = f"{r['model']} on {r['data']}, LoRA of rank {r['r']}, {r['steps']} steps of "
        title += f"{r['batch']} texts, products in FP8 by "
        title += "their specification (simulated)" if r["simulated"] else "the sm_90 kernel"
        found.setdefault(title, []).append(r)
    return found


def _runs_table(runs: Sequence[dict]) -> str:
    """A line for each base: each measure over the seeds, and whether it is that of bf16."""
    measures = ["final_loss", *dict.fromkeys(name for r in runs for name in r["heldout"])]
    header, rows = ["base", "seeds"], []
    for what in measures:
        name = "training loss at the end" if what == "final_loss" else f"held-out {what}"
        header += [name, "minus bf16", "within seed deviation"]
    for base in dict.fromkeys(r["base"] for r in runs):
        mine = [r for r in runs if r["base"] == base]
        diverged = sum(r["note"] is not None for r in mine)
        rows.append([base, f"{len(mine)}{f', {diverged} diverged' if diverged else ''}"])
        for what in measures:
            rows[-1] += _verdict_cells(verdict(values(runs, what), base), base, diverged)
    return markdown_table(header, *rows)


def _verdict_cells(found: Verdict | None, base: str, diverged: int) -> list[str]:
    if found is None:
        return ["", "", "no" if diverged else ""]
    spread = "" if found.deviation is None else f" ± {found.deviation:.4f}"
    cells = [f"{found.mean:.4f}{spread}"]
    if base == PLAIN:
        return [*cells, "", ""]
    within = "no" if diverged else {None: "one seed", True: "yes", False: "no"}[found.within]
    return [*cells, f"{found.difference:+.4f}", within]


def _layer_table(records: Sequence[dict]) -> str:
    """A line for each output of each type of layer, a column for each product."""
    bases = list(dict.fromkeys(r["base"] for r in records))
    rows = []
    for layer in dict.fromkeys(r["layer"] for r in records):
        mine = {r["base"]: r for r in records if r["layer"] == layer}
        first = next(iter(mine.values()))
        shape = first["shape"]
        size = f"{first['layers']} of {shape['M']}x{shape['K']}x{shape['N']}"
        kernels = dict.fromkeys(r["by"] for r in mine.values() if r["base"].startswith("FP8, "))
        for output in first["mean"]:
            cells = [f"{mine[base]['mean'][output]:.1e}" for base in bases]
            rows.append([layer, size, ", ".join(kernels), output, *cells])
    return markdown_table(["layer", "tokens, in, out", "FP8 by", "of", *bases], *rows)


def _format_table(records: Sequence[dict]) -> str:
    """A line for each type of layer, a column for each granularity and format."""
    cases = list(dict.fromkeys((r["base"], r["dy"]) for r in records))
    rows = []
    for layer in dict.fromkeys(r["layer"] for r in records):
        mine = {(r["base"], r["dy"]): r["mean"]["dx"] for r in records if r["layer"] == layer}
        rows.append([layer, *(f"{mine[case]:.2e}" for case in cases)])
    return markdown_table(["layer", *(f"{base}: {name}" for base, name in cases)], *rows)


# ---------------------------------------------------------------------------- the picture


def curve_records(records: Sequence[dict]) -> list[dict]:
    return [r for r in records if r["op"] == "fp8_accuracy" and r["part"] == "run"]


def draw_curves(figure, records: Sequence[dict]) -> None:
    """A row for each model and text: the loss curves, and their differences from bf16."""
    found = _measurements(records)
    figure.set_size_inches(12, 0.8 + 4.8 * len(found))
    for (losses, differences), (title, runs) in zip(
        figure.subplots(len(found), 2, squeeze=False), found.items(), strict=True
    ):
        curves = {base: _curves(runs, base) for base in COLOURS}
        plain = curves[PLAIN]
        for base, mine in curves.items():
            _line(losses, base, list(mine.values()), band=True)
            if base != PLAIN:
                common = [(mine[seed], plain[seed]) for seed in mine if seed in plain]
                lost = [[a - b for a, b in zip(*pair, strict=False)] for pair in common]
                _line(differences, base, lost)
        if len(plain) > 1:
            spread = [statistics.stdev(step) for step in zip(*plain.values(), strict=False)]
            label = "standard deviation of bf16 over its seeds"
            _band(differences, [-s for s in spread], spread, color="0.5", label=label)
        losses.set_ylabel(f"training loss, mean of {EVERY} steps")
        what, _, how = title.partition(", products")
        words = f"line: mean of {len(plain)} seeds; band: their standard deviation"
        losses.set_title(f"{what}\nproducts{how}\n{words}", fontsize=9)
        differences.axhline(0, color=COLOURS[PLAIN], linewidth=1)
        differences.set_ylabel("mean over seeds of: loss minus that of bf16, same seed")
        differences.set_title("inside the grey band: no more than another seed does", fontsize=9)
        for axes in (losses, differences):
            axes.set_xlabel("optimizer step")
            axes.grid(alpha=0.3)
            axes.legend(fontsize=8)


def _curves(runs: Sequence[dict], base: str) -> dict[int, list[float]]:
    return {r["seed"]: r["curve"] for r in runs if r["base"] == base and r["curve"]}


def _line(axes, base: str, curves: Sequence[Sequence[float]], band: bool = False) -> None:
    """The mean of some curves, which ends where the first of them does."""
    if not curves:
        return
    steps = list(zip(*curves, strict=False))
    means = [statistics.fmean(step) for step in steps]
    places = [EVERY * i for i in range(1, len(means) + 1)]
    axes.plot(places, means, color=COLOURS[base], label=base)
    if band and len(curves) > 1:
        spread = [statistics.stdev(step) for step in steps]
        low = [m - s for m, s in zip(means, spread, strict=True)]
        high = [m + s for m, s in zip(means, spread, strict=True)]
        _band(axes, low, high, color=COLOURS[base])


def _band(axes, low: Sequence[float], high: Sequence[float], **style) -> None:
    places = [EVERY * i for i in range(1, len(low) + 1)]
    axes.fill_between(places, low, high, alpha=0.15, linewidth=0, **style)
