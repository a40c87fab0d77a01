"""Write the tables of README.md from results/*.json, between its `<!-- name -->` marks, and plots.

python benchmarks/tables.py            rewrites the tables, and the plots beside the results
python benchmarks/tables.py --check    exits with 1 where a table or a plot is not up to date
"""

import json
import re
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

from deltadiff.bench.plots import NAMES, plots, stale_plots, write_plots
from deltadiff.bench.timing import case_text, shape_text
from deltadiff.files import slug
from deltadiff.finetune.compare import report as compare_report
from deltadiff.finetune.compare.report import grouped
from deltadiff.text import markdown_table

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def load() -> list[dict]:
    return [r for path in sorted(RESULTS.glob("*.json")) for r in json.loads(path.read_text())]


def verify_table(records: list[dict]) -> str:
    """A line an operation, dtype and path: how many checks, and the worst of them."""
    rows = []
    for (gpu, op, dtype, path), found in grouped(records, "gpu", "op", "dtype", "path").items():
        checked = [r for r in found if r["ok"] is not None]
        ratios = [r["ratio"] for r in checked if isinstance(r["ratio"], float)]
        shares = [r["error"] / r["limit"] for r in checked if r["limit"]]
        passed = f"{sum(r['ok'] for r in checked)} of {len(checked)}"
        median = f"{statistics.median(ratios):.2f}" if ratios else ""
        worst = f"{max(shares):.2f}" if shares else ""
        rows.append([gpu, op, dtype, path, passed, median, worst])
    header = ["machine", "operation", "dtype", "path", "passed", "error / eager's (median)"]
    return markdown_table([*header, "error / limit (largest)"], *rows)


def by_machine(records: list[dict], table: Callable[[list[dict]], str]) -> str:
    """A table of its own for each machine, under its name."""
    parts = []
    for (gpu,), found in grouped(records, "gpu").items():
        versions = sorted({f"torch {r['torch']}, Triton {r['triton']}" for r in found})
        parts.append(f"\n**{gpu}** ({'; '.join(versions)})\n\n{table(found)}")
    return "\n".join(parts) + "\n"


def cases(records: list[dict]) -> dict[tuple, list[dict]]:
    """(op, shape, case) as the table words them: the records of their variants."""
    texts = [{**r, "shape": shape_text(r), "case": case_text(r)} for r in records]
    return grouped(texts, "op", "shape", "case")


def speed_table(records: list[dict]) -> str:
    """A line a case, a column a variant: its median over that of the floor."""
    names = [name for name in NAMES if any(r["variant"] == name for r in records)]
    floors = [name for name in names if name in ("frozen", "copy")]
    names = [name for name in names if name not in floors]
    rows = []
    for (op, size, case), found in cases(records).items():
        of = {r["variant"]: r for r in found}
        if op == "lora_linear" and "eager" not in of:
            continue  # a size in between, for the plots
        floor = next(of[name] for name in floors if name in of)
        cells = [ratio(of.get(name), bold=name == "deltadiff") for name in names]
        ours = of.get("deltadiff", {})
        cells += [number(ours.get("host_ms"), ".3f"), number(ours.get("peak_mib"), ".1f")]
        rows.append([op, size, case, f"{floor['variant']} {floor['p50_ms']:.3f}", *cells])
    header = ["operation", "shape", "case", "floor, ms", *(NAMES[name] for name in names)]
    return markdown_table([*header, "host ms", "MiB"], *rows)


def ratio(r: dict | None, bold: bool) -> str:
    if r is None or r["over_floor"] is None:
        return (r and r.get("note")) or ""
    return f"**{r['over_floor']:.2f}**" if bold else f"{r['over_floor']:.2f}"


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def model_table(records: list[dict]) -> str:
    """A line a method; the columns once without and once with gradient checkpointing."""
    records = sorted(records, key=lambda r: (r["variant"] != "frozen", r["targets"] == "all"))
    rows = []
    for names, found in grouped(
        records, "model", "targets", "variant", "method", "rounding"
    ).items():
        model, targets, variant, method, rounding = names
        cells = [model, targets or "", NAMES[variant], method or "", rounding or ""]
        for on in (False, True):
            r = next((r for r in found if r["checkpointing"] is on), {})
            peak = None if r.get("peak_mib") is None else r["peak_mib"] / 1024
            cells += [r.get("note") or number(r.get("p50_ms"), ".0f")]
            cells += [number(r.get("over_floor"), ".3f"), number(peak, ".1f")]
        rows.append(cells)
    header = ["model", "layers", "by", "method", "rounding", "ms a step", "x frozen", "peak GiB"]
    return markdown_table([*header, *(f"{name}, checkpointing" for name in header[-3:])], *rows)


def search_table(records: list[dict]) -> str:
    """A line a case, the time and then the peak memory of each variant."""
    names = [name for name in NAMES if any(r["variant"] == name for r in records)]
    rows = []
    for (_, size, case), found in cases(records).items():
        of = {r["variant"]: r for r in found}
        cells = [number(of["frozen"]["p50_ms"], ".2f")]
        cells += [ratio(of.get(name), bold=name == "deltadiff") for name in names[1:]]
        cells += [number(of.get(name, {}).get("peak_mib"), ".0f") for name in names]
        rows.append([size, case, *cells])
    header = ["shape", "case", "floor, ms", *(NAMES[name] for name in names[1:])]
    return markdown_table([*header, *(f"MiB: {NAMES[name]}" for name in names)], *rows)


def plot_links(records: list[dict]) -> str:
    found = plots(records, RESULTS).items()
    links = [
        f"![{title}, {shown[0]['gpu']}]({path.relative_to(README.parent)})"
        for path, (_, title, shown) in found
    ]
    return "\n" + "\n\n".join(links) + "\n" if links else "not measured yet"


def compare_tables(records: list[dict]) -> str:
    """A table for each comparison, under what it was of, and its sweeps in tables of their own."""
    parts = []
    for (gpu, _, task), found in grouped(records, "gpu", "model", "task").items():
        caption = compare_report.caption(found)
        parts.append(f"{caption}:")
        parts += [compare_report.markdown(mine) for mine in grouped(found, "sweep").values()]
        for path in sorted(RESULTS.glob(f"compare-{slug(task)}-{slug(gpu)}-*.png")):
            parts.append(f"![{caption}]({path.relative_to(README.parent)})")
    return "\n" + "\n\n".join(parts) + "\n"


def is_speed(*ops: str) -> Callable[[dict], bool]:
    return lambda r: r["op"] in ops and "variant" in r


STEP = ("delta_update", "adamw_step", "step")
PARTS: dict[str, tuple[Callable[[list[dict]], str], Callable[[dict], bool]]] = {
    "verify": (verify_table, lambda r: "error" in r),
    "layer": (partial(by_machine, table=speed_table), is_speed("lora_linear")),
    "step": (partial(by_machine, table=speed_table), is_speed(*STEP)),
    "model": (partial(by_machine, table=model_table), is_speed("model")),
    "search": (partial(by_machine, table=search_table), is_speed("search")),
    "plots": (plot_links, is_speed("lora_linear", *STEP, "model")),
    "compare": (compare_tables, lambda r: r["op"] == "compare"),
}


def fill(text: str, records: list[dict]) -> str:
    """``text`` with what stands between each part's marks made anew."""
    for name, (write, belongs) in PARTS.items():
        mine = [r for r in records if belongs(r)]
        body = write(mine) if mine else "not measured yet"
        body = f"\n{body}\n" if "\n" in body else body
        mark = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text) and mine:
            raise SystemExit(f"{README.name} has no mark <!-- {name} -->")
        text = mark.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def main() -> int:
    old, records = README.read_text(), load()
    new = fill(old, records)
    speed = [r for r in records if PARTS["plots"][1](r)]
    if sys.argv[1:] == ["--check"]:
        stale = [README.name] * (old != new) + [p.name for p in stale_plots(speed, RESULTS)]
        print(f"not up to date: {', '.join(stale)}; run tables.py" if stale else "up to date")
        return bool(stale)
    README.write_text(new)
    write_plots(speed, RESULTS)
    return 0


if __name__ == "__main__":
    sys.exit(main())
