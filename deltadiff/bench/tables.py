"""What records of `deltadiff bench` say, as tables in Markdown."""

from collections.abc import Iterable, Sequence

from ..text import grouped, markdown_table
from .report import VARIANT_NAMES, case_text, shape_text

FLOORS = ("frozen", "copy")
OURS = ("deltadiff", "deltadiff-4bit", "deltadiff-fp8")

Records = Sequence[dict]


def number(value: float | None, spec: str) -> str:
    return "" if value is None else format(value, spec)


def ratio(r: dict | None, bold: bool = False) -> str:
    """Its time over that of the floor, or why there is none."""
    if r is None or r["over_floor"] is None:
        return (r and r.get("note")) or ""
    return f"**{r['over_floor']:.2f}**" if bold else f"{r['over_floor']:.2f}"


def gib(r: dict | None, spec: str) -> str:
    return "" if r is None or r["peak_mib"] is None else format(r["peak_mib"] / 1024, spec)


def by_variant(records: Iterable[dict]) -> dict[str, dict]:
    return {r["variant"]: r for r in records}


def cases(records: Records) -> dict[tuple, list[dict]]:
    """The records of each (op, shape, case), in words."""
    texts = [{**r, "shape": shape_text(r), "case": case_text(r)} for r in records]
    return grouped(texts, "op", "shape", "case")


def speed_table(records: Records) -> str:
    """A line for each case, a column for each variant: its median over that of the floor."""
    names = [name for name in VARIANT_NAMES if any(r["variant"] == name for r in records)]
    floors = [name for name in names if name in FLOORS]
    names = [name for name in names if name not in floors]
    rows = []
    for (op, size, case), found in cases(records).items():
        variants = by_variant(found)
        if op == "lora_linear" and "eager" not in variants:
            continue  # a point of the plots only
        floor = next(variants[name] for name in floors if name in variants)
        cells = [ratio(variants.get(name), bold=name in OURS) for name in names]
        ours = next((variants[name] for name in OURS if name in variants), {})
        cells += [number(ours.get("host_ms"), ".3f"), number(ours.get("peak_mib"), ".1f")]
        rows.append([op, size, case, f"{floor['variant']} {floor['p50_ms']:.3f}", *cells])
    header = ["operation", "shape", "case", "floor, ms", *(VARIANT_NAMES[name] for name in names)]
    return markdown_table([*header, "host ms", "MiB"], *rows)


def block_table(records: Records) -> str:
    """A line for each block: the time of each variant over the floor, and its memory."""
    names = [name for name in VARIANT_NAMES if any(r["variant"] == name for r in records)]
    rows = []
    for (_, size, case), found in cases(records).items():
        variants = by_variant(found)
        cells = [number(variants["frozen"]["p50_ms"], ".3f")]
        for name in names:
            mine = variants.get(name)
            speed = [] if name == "frozen" else [ratio(mine, bold=name in OURS)]
            cells += [*speed, number(mine and mine["peak_mib"], ",.0f")]
        rows.append([size, case, *cells])
    header = ["shape", "case", "floor, ms", "MiB"]
    for name in names[1:]:
        header += [VARIANT_NAMES[name], "MiB"]
    return markdown_table(header, *rows)


def model_table(records: Records) -> str:
    """A line for each method; the same columns without and with gradient checkpointing."""
    records = sorted(records, key=lambda r: (r["variant"] != "frozen", r["targets"] == "all"))
    keys = ("model", "targets", "variant", "method", "rounding")
    rows = []
    for (model, targets, variant, *how), found in grouped(records, *keys).items():
        cells = [model, targets or "", VARIANT_NAMES[variant], *(word or "" for word in how)]
        for on in (False, True):
            r = next((r for r in found if r["checkpointing"] is on), None)
            cells += [r and r.get("note") or number(r and r["p50_ms"], ".0f")]
            cells += [number(r and r["over_floor"], ".3f"), gib(r, ".1f")]
        rows.append(cells)
    header = ["model", "layers", "by", "method", "rounding", "ms a step", "x frozen", "peak GiB"]
    return markdown_table([*header, *(f"{name}, checkpointing" for name in header[-3:])], *rows)


def whole_step_table(records: Records) -> str:
    """A line for each way to train a model on a base, without and with checkpointing."""
    keys = ("model", "base", "liger", "checkpointing", "offload")
    rows = []
    for (model, base, liger, on, offload), found in grouped(records, *keys).items():
        what = f"{model}, {base}{', Liger' * liger}{', checkpointing' * on}"
        what += f", offloaded by {offload}" if offload else ""
        for r in sorted(found, key=lambda r: r["variant"] != "frozen"):
            tokens = None if r["p50_ms"] is None else r["shape"]["M"] / r["p50_ms"] * 1e3
            words = (VARIANT_NAMES[r["variant"]], r["method"], r["rounding"])
            cells = [what, ", ".join(filter(None, words))]
            cells += [r.get("note") or number(r["p50_ms"], ".0f"), number(r["over_floor"], ".3f")]
            rows.append([*cells, number(tokens, ",.0f"), gib(r, ".1f")])
    header = ["model", "by", "ms a step", "x frozen", "tokens/s", "peak GiB"]
    return markdown_table(header, *rows)


def search_table(records: Records) -> str:
    """A line for each case: the time of each variant, then the peak memory of each."""
    names = [name for name in VARIANT_NAMES if any(r["variant"] == name for r in records)]
    rows = []
    for (_, size, case), found in cases(records).items():
        variants = by_variant(found)
        cells = [number(variants["frozen"]["p50_ms"], ".2f")]
        cells += [ratio(variants.get(name), bold=name == "deltadiff") for name in names[1:]]
        cells += [number(variants.get(name, {}).get("peak_mib"), ".0f") for name in names]
        rows.append([size, case, *cells])
    header = ["shape", "case", "floor, ms", *(VARIANT_NAMES[name] for name in names[1:])]
    return markdown_table([*header, *(f"MiB: {VARIANT_NAMES[name]}" for name in names)], *rows)
