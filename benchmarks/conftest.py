"""Fixtures of the benchmarks, and the table at the end. Run with `pytest benchmarks/`."""

import pytest
import record
import torch

found: list[dict] = []


@pytest.fixture(scope="session")
def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture
def compare(benchmark, device):
    """compare(variants, floor=..., op=..., ...) measures a case and keeps a record a variant."""

    def run(
        variants, *, floor, op, mode, shape, dtype, adapter_dtype=None, rounding=None, graph=False
    ):
        peaks = {name: record.peak_mib(call, device) for name, call in variants.items()}
        if graph:
            variants = {name: record.graphed(call) for name, call in variants.items()}
        seconds = record.measure(benchmark, variants, device)
        names = [str(d or dtype).removeprefix("torch.") for d in (dtype, adapter_dtype)]
        case = {"op": op, "mode": mode, "graph": graph, "shape": shape, "rounding": rounding}
        case |= {"dtype": names[0], "adapter_dtype": names[1]}
        found.extend(record.records(seconds, peaks, floor, **case))

    return run


def pytest_terminal_summary(terminalreporter):
    if not found:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    where = record.environment(device)
    write = terminalreporter.write_line
    terminalreporter.section(f"{where['gpu']}, torch {where['torch']}, threads {where['threads']}")
    rows = [("op", "shape", "dtype", "case", "variant", "p20", "p50", "p80 ms", "x floor", "MiB")]
    for r in found:
        times = [f"{r[key]:.3f}" for key in ("p20_ms", "p50_ms", "p80_ms")]
        peak = "" if r["peak_mib"] is None else f"{r['peak_mib']:.1f}"
        rows.append(
            (r["op"], shape_text(r), dtype_text(r), mode_text(r), r["variant"], *times)
            + (f"{r['over_floor']:.2f}", peak)
        )
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    for row in rows:
        cells = [
            cell.ljust(width) if i < 5 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        write("  ".join(cells).rstrip())
    terminalreporter.section("ratios (above 1: deltadiff is faster)")
    for line in ratios():
        write(line)
    for path in record.write(found, device):
        write(f"written: {path}")


def shape_text(r: dict) -> str:
    return " ".join(f"{key}{n}" for key, n in r["shape"].items() if n is not None)


def dtype_text(r: dict) -> str:
    mixed = r["adapter_dtype"] != r["dtype"]
    return f"{r['dtype']}, adapters {r['adapter_dtype']}" if mixed else r["dtype"]


def mode_text(r: dict) -> str:
    return " ".join(filter(None, (r["mode"], r["rounding"], "graph" * r["graph"])))


def ratios():
    """deltadiff against every other variant of its case, by medians."""
    cases: dict[tuple, dict[str, float]] = {}
    for r in found:
        case = (r["op"], dtype_text(r), shape_text(r), mode_text(r))
        cases.setdefault(case, {})[r["variant"]] = r["p50_ms"]
    for case, medians in cases.items():
        ours = medians.pop("deltadiff")
        parts = [
            f"{other / ours:.2f} {'of copy bandwidth' if name == 'copy' else f'x {name}'}"
            for name, other in medians.items()
        ]
        yield f"{', '.join(case)}: {', '.join(parts)}"
