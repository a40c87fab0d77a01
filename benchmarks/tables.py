"""Write the tables of README.md from results/*.json, between its `<!-- name -->` marks.

python benchmarks/tables.py            rewrites them
python benchmarks/tables.py --check    exits with 1 where README.md is not up to date
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

README = Path(__file__).parent.parent / "README.md"
RESULTS = Path(__file__).parent / "results"


def load() -> list[dict]:
    return [r for path in sorted(RESULTS.glob("*.json")) for r in json.loads(path.read_text())]


def grouped(records: Iterable[dict], *names: str) -> dict[tuple, list[dict]]:
    groups: dict[tuple, list[dict]] = {}
    for r in records:
        groups.setdefault(tuple(r.get(name) for name in names), []).append(r)
    return groups


def markdown(header: list[str], rows: list[list[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


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
    return markdown([*header, "error / limit (largest)"], rows)


def speed_table(records: list[dict]) -> str:
    """A line a case; a variant is told as its median over the floor's."""
    names = ("gpu", "op", "dtype", "mode", "rounding", "graph")
    cases = grouped([{**r, "size": shape(r), "dtype": dtypes(r)} for r in records], *names, "size")
    rows = []
    for (gpu, op, dtype, mode, rounding, graph, size), found in cases.items():
        by_name = {r["variant"]: r for r in found}
        floor = min(found, key=lambda r: abs(r["over_floor"] - 1))
        ours = by_name["deltadiff"]
        others = [
            f"{name} {r['over_floor']:.2f}"
            for name, r in by_name.items()
            if name not in ("deltadiff", floor["variant"])
        ]
        case = ", ".join(filter(None, (mode, rounding, "CUDA graph" if graph else "")))
        rows.append([
            gpu, op, size, dtype, case, f"{floor['variant']} {floor['p50_ms']:.3f} ms",
            f"**{ours['over_floor']:.2f}**", ", ".join(others),
        ])  # fmt: skip
    header = ["machine", "operation", "shape", "dtype", "case", "floor", "deltadiff / floor"]
    return markdown([*header, "others / floor"], rows)


def dtypes(r: dict) -> str:
    adapters = r.get("adapter_dtype") or r["dtype"]
    return r["dtype"] if adapters == r["dtype"] else f"{r['dtype']}/{adapters}"


def shape(r: dict) -> str:
    return " ".join(f"{key}={n}" for key, n in r["shape"].items() if n is not None)


def finetune_table(records: list[dict]) -> str:
    """A line a method: mean and standard deviation over the seeds."""
    rows = []
    metrics = [n.removesuffix("_after") for n in records[0] if n.endswith("_after")]
    for (gpu, method), found in grouped(records, "gpu", "method").items():
        cells = [gpu, method, str(len(found))]
        for name in metrics:
            before, after = ([r[f"{name}_{w}"] for r in found] for w in ("before", "after"))
            cells.append(f"{statistics.fmean(before):.3f} -> {spread(after)}")
        shares = [r["share"] for r in found if r["share"] is not None]
        cells.append(spread(shares) if shares else "")
        rows.append(cells)
    header = ["machine", "method", "seeds", *(f"held-out {name}" for name in metrics)]
    return markdown([*header, "share of the update in W"], rows)


def spread(values: list[float]) -> str:
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def finetune_caption(records: list[dict]) -> str:
    r = records[0]
    return (
        f"{Path(r['model']).name}, {r['data'].removeprefix('package:')}, {r['dtype']}, "
        f"r = {r['r']}, {r['target_modules']}, {r['steps']} steps of {r['batch_size']}, "
        f"lr {r['lr']:g}, lambda {r['update_ratio']:g}, K {r['start_step']}"
    )


OPERATIONS = ("lora_linear", "delta_update", "adamw_step")
PARTS: dict[str, tuple[Callable[[list[dict]], str], Callable[[dict], bool]]] = {
    "verify": (verify_table, lambda r: "error" in r),
    "benchmarks": (speed_table, lambda r: r["op"] in OPERATIONS and "variant" in r),
    "finetune": (finetune_table, lambda r: r["op"] == "finetune"),
    "finetune-caption": (finetune_caption, lambda r: r["op"] == "finetune"),
}


def fill(text: str, records: list[dict]) -> str:
    """``text`` with what stands between each part's marks made anew."""
    for name, (write, belongs) in PARTS.items():
        mine = [r for r in records if belongs(r)]
        body = write(mine) if mine else "not measured yet"
        body = f"\n{body}\n" if "\n" in body else body
        mark = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text):
            raise SystemExit(f"{README.name} has no mark <!-- {name} -->")
        text = mark.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def main() -> int:
    old = README.read_text()
    new = fill(old, load())
    if sys.argv[1:] == ["--check"]:
        print("README.md is " + ("up to date" if old == new else "not up to date: run tables.py"))
        return int(old != new)
    README.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
