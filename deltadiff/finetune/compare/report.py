"""What a comparison makes of its records: tables, JSON and figures.

A cell of a table is the mean over the seeds and their standard deviation (of a sample, n - 1).
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

from ...files import write_records, write_text
from ...text import align_columns, grouped, markdown_table
from ..methods.table import METHODS
from ..plots import plot_curves, plot_differences, plot_metrics, plot_sweep
from ..tasks.choose import METRIC_TITLES


def line(records: Sequence[dict]) -> str:
    """The records of one run in a few words."""
    if records[0]["note"]:
        return records[0]["note"]
    return ", ".join(f"{r['metric']} {r['value']:.4g}" for r in records)


# ----------------------------------------------------------------------------- tables


def spread(values: Sequence[float], digits: int = 3) -> str:
    """Mean, and the standard deviation if there is more than one value."""
    deviation = f" ± {statistics.stdev(values):.{digits}f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.{digits}f}{deviation}"


def table(records: Sequence[dict]) -> list[list[str]]:
    """A header, and one line for each method (and each value of a sweep), of the runs reported.

    "update in W" is the share of Delta-LoRA's wanted update that W holds. "seconds" is the time of
    all steps, those of a search too, with compilation; "ms a step" is the median of a run.
    "diverged" counts runs, see `learning_rates`; a mean holds them too.
    """
    records = reported(records)
    there = {r["metric"] for r in records}
    metrics = [name for name in METRIC_TITLES if name in there]
    sweeps = any(r["sweep"] for r in records)
    rates = len({r["lr"] for r in records}) > 1
    header = ["method", *(["sweep"] if sweeps else []), *(["lr"] if rates else []), "seeds"]
    header += [METRIC_TITLES[m] for m in metrics]
    shares = any(r["share"] is not None for r in records)
    header += ["update in W"] if shares else []
    diverged = any(r.get("diverged") for r in records)
    header += ["diverged"] if diverged else []
    rows = [[*header, "trained", "seconds", "ms a step", "peak MiB"]]
    for (method, sweep, x), found in grouped(records, "method", "sweep", "x").items():
        ran = [r for r in found if r["value"] is not None]
        runs = {r["seed"]: r for r in ran}.values()
        cells = [METHODS[method].text]
        cells += [f"{sweep} {x:g}" if sweep else ""] if sweeps else []
        cells += [f"{found[0]['lr']:g}"] if rates else []
        cells.append(str(len(runs)))
        for metric in metrics:
            values = [r["value"] for r in ran if r["metric"] == metric]
            cells.append(spread(values) if values else "")
        if shares:
            values = [r["share"] for r in runs if r["share"] is not None]
            cells.append(spread(values) if values else "")
        if diverged:
            cells.append(str(sum(bool(r["diverged"]) for r in runs) or ""))
        trained = sorted({r["trainable"] for r in runs if r["trainable"] is not None})
        cells.append(" to ".join(f"{n:,}" for n in trained[:: max(1, len(trained) - 1)]))
        for name in ("seconds", "step_ms", "peak_mib"):
            values = [r[name] for r in runs if r.get(name) is not None]
            cells.append(spread(values, 1) if values else "")
        rows.append(cells)
    return rows


def reported(records: Iterable[dict]) -> list[dict]:
    """The records of runs that are reported: not those by which a learning rate was chosen."""
    return [r for r in records if r["op"] == "compare" and r.get("stage") != "tuning"]


def rates_table(records: Sequence[dict]) -> list[list[str]]:
    """A line for each method, a column for each learning rate: how its run of the choice ended.

    "*" marks the rate that was chosen, "diverged" a run that is no better than none. A method
    without a run at a rate has an empty cell. The last column says where the chosen rate is the
    smallest or the largest that was tried, so that others might be better.
    """
    tuning = [r for r in records if r.get("stage") == "tuning" and r["metric"] == r["by"]]
    chosen = {_arm(r): r["lr"] for r in reported(records)}
    rates = sorted({r["lr"] for r in tuning})
    rows = [["method", *(f"{lr:g}" for lr in rates), "chosen at the edge"]]
    for (method, sweep, x), found in grouped(tuning, "method", "sweep", "x").items():
        cells = {}
        for r in found:
            mark = "*" if chosen.get(_arm(r)) == r["lr"] else ""
            cells[r["lr"]] = f"{r['value']:.3f}{mark}{' diverged' if r['diverged'] else ''}"
        lr = chosen.get((method, sweep, x))
        edge = {min(cells): "smallest", max(cells): "largest"}.get(lr, "")
        rows.append([arm_text(method, sweep, x), *(cells.get(lr, "") for lr in rates), edge])
    return rows


def difference_table(records: Sequence[dict]) -> list[list[str]]:
    """A line for each paired difference: above 0 the method is better than what it is beside."""
    rows = [["method", "beside", "metric", "better by", "interval", "diverged"]]
    for r in differences_of(records):
        one, other = pair_text(r)
        diverged = f"{r['diverged']} / {r['control_diverged']}"
        rows.append([
            one, other, METRIC_TITLES[r["metric"]],
            f"{r['gain']:+.4f}", f"{r['low']:+.4f} to {r['high']:+.4f}",
            diverged if diverged != "0 / 0" else "",
        ])  # fmt: skip
    return rows


def differences_of(records: Iterable[dict]) -> list[dict]:
    return [r for r in records if r["op"] == "compare_difference"]


def pair_text(r: dict) -> tuple[str, str]:
    """What a difference is between, in words."""
    beside = None if r["control_x"] is None else r["sweep"]
    return arm_text(*_arm(r)), arm_text(r["control"], beside, r["control_x"])


def drawn(r: dict) -> dict:
    """A difference as `plot_differences` takes it."""
    one, other = pair_text(r)
    counted = r["diverged"] + r["control_diverged"]
    metric = METRIC_TITLES[r["metric"]]
    return r | {"pair": f"{one} against {other}", "metric": metric, "diverged": counted}


def arm_text(method: str, sweep: str | None, x: float | None) -> str:
    return METHODS[method].text + ("" if sweep is None else f", {sweep} {x:g}")


def _arm(r: dict) -> tuple:
    return r["method"], r["sweep"], r["x"]


def notes(records: Sequence[dict]) -> list[str]:
    """Why runs are not in a table, or diverged, one line for each.

    Those of the choice of a rate that diverged are in its table.
    """
    runs = [r for r in records if r["op"] == "compare" and r["note"]]
    shown = [r for r in runs if r.get("stage") != "tuning" or r["value"] is None]
    found = {(METHODS[r["method"]].text, r["note"]): None for r in shown}
    return [f"{name}: {note}" for name, note in found]


def _tables(records: Sequence[dict]) -> list[list[list[str]]]:
    """The tables of a comparison: one, or with tuned learning rates three."""
    tuned = any(r.get("stage") for r in records)
    more = [rates_table(records), difference_table(records)] if tuned else []
    return [table(records), *(rows for rows in more if len(rows) > 1)]


def text(records: Sequence[dict]) -> str:
    """Tables and notes for a terminal."""
    return "\n".join(["\n\n".join(map(align_columns, _tables(records))), *notes(records)])


def markdown(records: Sequence[dict]) -> str:
    """Tables and notes as Markdown."""
    tables = "\n\n".join(markdown_table(*rows) for rows in _tables(records))
    return "\n".join([tables, *(f"\n{note}" for note in notes(records))])


def caption(records: Sequence[dict]) -> str:
    """Model, text, budget, settings that all records have in common, and where the runs were."""
    records = reported(records)
    r = records[0]
    words = [f"{r['model']}, {r['task']}: {r['steps']} steps of {r['batch_size']}", r["dtype"]]
    names = {"r": "r", "lr": "lr", "update_ratio": "lambda", "start_step": "K"}
    for field, name in names.items():
        if len({r[field] for r in records}) == 1:
            words.append(f"{name} {r[field]:g}")
    versions = [f"{name} {r[name]}" for name in ("torch", "transformers") if r.get(name)]
    return ", ".join([*words, r["gpu"], *versions])


# ------------------------------------------------------------------------------ files


def write(place: Path, records: Sequence[dict], runs: Sequence[tuple]) -> list[Path]:
    """Write ``place``.json, .txt, .md and figures; returns their paths.

    ``runs`` are pairs of a `Case` and what its result.json holds, or None.
    """
    paths = [place.with_name(place.name + ending) for ending in (".json", ".txt", ".md")]
    write_records(paths[0], records)
    write_text(paths[1], f"{caption(records)}\n\n{text(records)}\n")
    write_text(paths[2], f"{caption(records)}\n\n{markdown(records)}\n")
    return paths + plots(place, records, runs)


def plots(place: Path, records: Sequence[dict], runs: Sequence[tuple]) -> list[Path]:
    """Metrics, loss and similarity by method, and one figure for each sweep."""
    paths = []

    def target(name: str) -> Path:
        paths.append(place.with_name(f"{place.name}-{name}.png"))
        return paths[-1]

    title = caption(records)
    ran = [r for r in reported(records) if r["value"] is not None]
    if by_method := _values([r for r in ran if not r["sweep"]], "method"):
        plot_metrics(target("metrics"), by_method, title)
    plain = [(case, result) for case, result in runs if result and case.sweep is None]
    if plain:
        losses = _by_method(plain, lambda result: result["loss_curve"])
        plot_curves(target("loss"), losses, title, "optimizer step", "training loss")
        blocks = _by_method([run for run in plain if run[1]["similarity"]], _block_means)
        if blocks:
            label = "cosine similarity of the weights that changed and the original ones"
            plot_curves(target("similarity"), blocks, title, "block", label, smooth=False)
    for (sweep,), found in grouped((r for r in ran if r["sweep"]), "sweep").items():
        by_x = {m: _values(mine, "x") for (m,), mine in grouped(found, "method").items()}
        plot_sweep(target(f"sweep-{sweep}"), sweep, by_x, title)
    main = [drawn(r) for r in differences_of(records) if r["sweep"] is None]
    if main:
        panels = {metric: found for (metric,), found in grouped(main, "metric").items()}
        plot_differences(target("differences"), panels, title)
    return paths


# Method or x -> metric -> one value for each seed.
Values = Mapping[object, Mapping[str, list[float]]]


def _values(records: Iterable[dict], key: str) -> Values:
    """``key`` is the entry of the records, "method" or "x"."""
    found: dict[object, dict[str, list[float]]] = {}
    for r in records:
        metric = METRIC_TITLES[r["metric"]]
        found.setdefault(r[key], {}).setdefault(metric, []).append(r["value"])
    return found


def _by_method(runs: Sequence[tuple], curve) -> dict[str, list[list[float]]]:
    """Method -> what ``curve`` makes of the result of each seed."""
    found: dict[str, list[list[float]]] = {}
    for case, result in runs:
        found.setdefault(case.settings.method, []).append(curve(result))
    return found


def _block_means(result: dict) -> list[float]:
    """The mean similarity over the linear layers of each block."""
    blocks: dict[int, list[float]] = {}
    for places in result["similarity"].values():
        for block, cosine in places.items():
            blocks.setdefault(int(block), []).append(cosine)
    return [statistics.fmean(blocks[block]) for block in sorted(blocks)]
