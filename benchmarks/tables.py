"""Write the tables of README.md and benchmarks/README.md from results/*.json, and the plots.

Each table stands between the marks `<!-- name -->` and `<!-- end -->`; nobody types a figure.

python benchmarks/tables.py            rewrites the tables, and the plots beside the results
python benchmarks/tables.py --check    exits with 1 if a table or a plot is not up to date
"""

import json
import re
import statistics
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from deltadiff.bench import fp8_accuracy
from deltadiff.bench.plots import DIGEST, digest, plots, stale_plots, write_plots
from deltadiff.bench.report import VARIANT_NAMES, shape_text
from deltadiff.bench.tables import (
    FLOORS,
    block_table,
    by_variant,
    gib,
    model_table,
    number,
    ratio,
    search_table,
    speed_table,
    whole_step_table,
)
from deltadiff.files import slug, write_text
from deltadiff.finetune.compare import claims
from deltadiff.finetune.compare.report import caption, markdown, rates_table, table
from deltadiff.finetune.plots import plot_differences
from deltadiff.text import grouped, markdown_table

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "benchmarks" / "results"
FRONT = ROOT / "README.md"
ALL = ROOT / "benchmarks" / "README.md"
METHODS = ROOT / "benchmarks" / "methods.md"
DIFFERENCES = RESULTS / "methods-differences.png"
STEP = ("delta_update", "adamw_step", "step")

Records = Sequence[dict]


def load() -> list[dict]:
    return [r for path in sorted(RESULTS.glob("*.json")) for r in json.loads(path.read_text())]


def image(title: str, path: Path, document: Path) -> str:
    return f"![{title}]({path.relative_to(document.parent)})"


# ------------------------------------------------------------------ all results, by operation


def by_machine(records: Records, table: Callable[[Records], str]) -> str:
    """For each machine its name, a table, and the plots of these records."""
    parts = []
    for (gpu,), found in grouped(records, "gpu").items():
        versions = sorted({f"torch {r['torch']}, Triton {r['triton']}" for r in found})
        parts += [f"**{gpu}** ({'; '.join(versions)})", table(found)]
        shown = plots(found, RESULTS)
        parts += [image(plot.title, path, ALL) for path, plot in shown.items()]
    return "\n" + "\n\n".join(parts) + "\n"


def verify_table(records: Records) -> str:
    """A line for each machine, operation, dtype and path: how many checks, and the worst."""
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


# What the rows of a suite of checks count, and what counts as a failure there.
SUITES = {
    "verify": "outputs and gradients against float64",
    "repeats": "repeats, bit by bit",
    "sequences": "sequences of an optimizer's calls against float64",
    "mutants": "wrong or damaged input: one line, nothing changed",
    "kills": "killed at a random moment, then resumed: the same result",
    "sanitizers": "calls under a tool that watches memory",
}


def checks_table(records: Records) -> str:
    """A line for each suite, operation, path and dtype: how many cases, and what failed."""
    rows = []
    for suite, words in SUITES.items():
        for r in (r for r in records if r["op_suite"] == suite):
            dtype, worst = r["dtype"] or "", number(r["worst_ratio"], ".2f")
            rows.append([r["gpu"], words, r["op"], r["path"], dtype, f"{r['cases']:,}"])
            rows[-1] += [str(r["failures"]), worst]
    header = ["machine", "what", "of", "path", "dtype", "cases", "failures"]
    return markdown_table([*header, "error / limit (largest)"], *rows)


NETWORK = 50e9  # bytes a second that a GPU sends to other nodes: 400 Gb/s for each
IN_A_NODE = 8  # GPUs


def scaling_table(records: Records) -> str:
    """A line for each way to train on several GPUs, beside as many GPUs alone."""
    rows = []
    for (_, model, method), found in grouped(records, "gpu", "model", "method").items():
        for r in sorted(found, key=lambda r: r["gpus"]):
            size = f"{r['batch']} x {r['sequence']}" + ", checkpointing" * r["checkpointing"]
            cells = [r["gpu"], model, method, size, r["way"], str(r["gpus"])]
            if r["note"]:
                rows.append([*cells, r["note"], "", "", ""])
                continue
            share = number(_share_of_linear(r["p50_ms"], found), ".3f")
            rows.append([*cells, f"{r['p50_ms']:.0f}", f"{r['tokens_per_s']:,.0f}", share])
            rows[-1].append(gib(r, ".1f"))
    header = ["machine", "model", "method", "batch of a GPU", "by", "GPUs", "ms a step", "tokens/s"]
    return markdown_table([*header, "of so many times one GPU", "peak GiB of a GPU"], *rows)


def expected_table(records: Records) -> str:
    """What more GPUs should give, by the formula in benchmarks/README.md."""
    rows = []
    for (_, model, method), found in grouped(records, "gpu", "model", "method").items():
        ways = {r["way"]: r for r in found if r["p50_ms"]}
        if ways.keys() != {"one GPU", "DDP", "FSDP2"}:
            continue
        alone, sharded = ways["one GPU"], ways["FSDP2"]
        link = _sent(sharded, sharded["gpus"]) / (sharded["p50_ms"] - alone["p50_ms"]) * 1e3
        for way in ("DDP", "FSDP2"):
            r = ways[way]
            cells = [model, method, way, f"{_sent(r, r['gpus']) / 1e9:.2f}"]
            for n in (IN_A_NODE, 64):
                rate = link if n <= IN_A_NODE else min(link, NETWORK)
                more = _sent(r, n) / rate - _sent(r, r["gpus"]) / link
                share = _share_of_linear(r["p50_ms"] + more * 1e3, found)
                cells += [f"{_sent(r, n) / 1e9:.2f}", number(share, ".2f")]
            rows.append([*cells, f"{link / 1e9:.0f}"])
    header = ["model", "method", "by", "GB sent, 2 GPUs", "GB sent, 8 GPUs", "expected, 8 GPUs"]
    header += ["GB sent, 64 GPUs", "expected, 64 GPUs", "GB/s in a node"]
    return markdown_table(header, *rows)


def _share_of_linear(ms: float, found: Records) -> float | None:
    """The throughput of a GPU whose step takes so long, over that of one GPU alone."""
    alone = next((r["p50_ms"] for r in found if r["way"] == "one GPU"), None)
    return alone and alone / ms


def _sent(r: dict, n: int) -> float:
    """The bytes that each of n GPUs sends in a step."""
    part, pairs = (n - 1) / n, r["adapter_bytes"]
    if r["way"] == "DDP":  # an all-reduce of the gradients
        return 2 * part * pairs
    # All parameters are gathered for the forward and for the backward pass, the gradients are
    # scattered, and an update of W in place gathers A' and what A moved by.
    update = 2 * r["lora_A_bytes"] if "in place" in r["method"] else 0
    return part * (2 * (r["frozen_bytes"] + pairs) + pairs + update)


def compare_tables(records: Records) -> str:
    """A table for each comparison under its caption, a table for each of its sweeps, figures."""
    parts = []
    for (gpu, _, task), found in grouped(records, "gpu", "model", "task").items():
        title = caption(found)
        parts.append(f"{title}:")
        parts += [markdown(mine) for mine in grouped(found, "sweep").values()]
        figures = sorted(RESULTS.glob(f"compare-{slug(task)}-{slug(gpu)}-*.png"))
        parts += [image(title, path, ALL) for path in figures]
    return "\n" + "\n\n".join(parts) + "\n"


def tuned_tables(records: Records, write: Callable[[Records], list[list[str]]]) -> str:
    """A table for each comparison with tuned learning rates, under its caption."""
    parts = []
    for found in grouped(records, "gpu", "model", "task").values():
        parts += [f"{caption(found)}:", markdown_table(*write(found))]
    return "\n" + "\n\n".join(parts) + "\n"


def differences_picture(records: Records) -> str:
    return "\n" + image("By how much each method is better", DIFFERENCES, METHODS) + "\n"


def write_differences(records: Records) -> None:
    """Draw the picture of the differences, if there are some."""
    shown = claims.pictured(records)
    if shown:
        title = "By how much each method is better, each at its own best learning rate"
        plot_differences(DIFFERENCES, shown, title, {DIGEST: _digest(shown)})


def _digest(shown: dict[str, list[dict]]) -> str:
    return digest([r for found in shown.values() for r in found])


def stale_differences(records: Records) -> list[Path]:
    """The file of that picture, if it is missing or was made of other records."""
    from PIL import Image

    shown = claims.pictured(records)
    if not shown:
        return []
    if DIFFERENCES.exists():
        with Image.open(DIFFERENCES) as picture:
            if picture.text.get(DIGEST) == _digest(shown):
                return []
    return [DIFFERENCES]


def families_table(records: Records) -> str:
    """A line for each family of models: what is adapted, and why the rest is not."""
    rows, few = [], "<0.1%"
    for r in records:
        shares = {kind: f"{x:.1%}" if x >= 0.0005 else few for kind, x in r["shares"].items()}
        adapted, whole = (shares.pop(kind, "") for kind in ("adapted", "trained whole"))
        rest = [f"{kind} {share}" for kind, share in shares.items() if share != few]
        layers = str(r["layers"])
        fused = [f"{r['fused']} of {r['peft_layers']}{' (named)' if r['peft_named'] else ''}"]
        fused += [f"{count} not: {why}" for why, count in r["others"].items()]
        size = f"{r['weights'] / 1e6:,.0f} M"
        cells = [r["model"], size, layers, adapted, whole, ", ".join(rest), "; ".join(fused)]
        rows.append(cells)
    header = ["model", "weights", "layers", "adapted", "whole", "not adapted", "fused in PEFT"]
    versions = sorted({f"transformers {r['transformers']}, PEFT {r['peft']}" for r in records})
    return f"\n{'; '.join(versions)}:\n\n{markdown_table(header, *rows)}\n"


def peft_calls_table(records: Records) -> str:
    """A line for each call of PEFT, a column for each method."""
    rows = [[r["call"], *r["outcomes"].values()] for r in records]
    return markdown_table(["call", *records[0]["outcomes"]], *rows)


def several_gpus_table(records: Records) -> str:
    """For each device a line for each method, a column for each way, and the reasons below."""
    parts = []
    for (device,), found in grouped(records, "device").items():
        reasons: list[str] = []
        rows = []
        for r in found:
            cells = [r["method"]]
            for text in r["outcomes"].values():
                refused = (text or "").startswith("refused: ")
                reason = text.removeprefix("refused: ") if refused else None
                if refused and reason not in reasons:
                    reasons.append(reason)
                cells.append(f"refused ({reasons.index(reason) + 1})" if refused else text or "-")
            rows.append(cells)
        versions = ", ".join(f"{name} {found[0][name]}" for name in SEVERAL_GPUS_VERSIONS)
        parts += [
            f"**{device}** ({versions})",
            markdown_table(["method", *found[0]["outcomes"]], *rows),
        ]
        parts += [" ".join(f"({i}) {reason}." for i, reason in enumerate(reasons, 1))]
    return "\n" + "\n\n".join(parts) + "\n"


SEVERAL_GPUS_VERSIONS = ("torch", "transformers", "accelerate", "deepspeed", "peft")


# ------------------------------------------------------------------ the table of README.md

# Machines and dtypes are not mixed in one table.
SUMMARY_GPU = "NVIDIA H100 80GB HBM3"
SUMMARY_DTYPE = "bfloat16"


def same(**wanted) -> Callable[[dict], bool]:
    """Whether a record says what is wanted; of a tuple any entry."""

    def check(r: dict) -> bool:
        flat = {**r, **r["shape"]}
        allowed = {k: v if isinstance(v, tuple) else (v,) for k, v in wanted.items()}
        return all(flat.get(name) in values for name, values in allowed.items())

    return check


_layer = partial(same, op="lora_linear", M=8192, K=4096, r=16, graph=False)
_step = partial(same, op="step", graph=False)
_model = partial(same, op="model", checkpointing=False, targets=(None, "all"))
_search = partial(same, op="search", model="Llama 1B")
SUMMARY = (
    ("a layer, forward", _layer(N=4096, mode="forward")),
    ("a layer, forward and backward", _layer(N=4096, mode="forward+backward")),
    ("a layer, forward and backward", _layer(N=11008, mode="forward+backward")),
    ("update of W, rounded to nearest", same(op="delta_update", rounding="nearest")),
    ("update of W with the remainder", same(op="delta_update", rounding="remainder")),
    ("optimizer step, rounded to nearest", _step(rounding="nearest")),
    ("optimizer step with the remainder", _step(model="Llama-2-7B", rounding="remainder")),
    ("training step, LoRA", _model(method=(None, "LoRA"))),
    ("training step, Delta-LoRA", _model(
        method=(None, "Delta-LoRA in place", "naive Delta-LoRA"), rounding=(None, "remainder"))),
    ("step of DiffoRA's search", _search(mode="search")),
)  # fmt: skip

# Columns, each with the variants that it may show.
PEERS = {
    **{VARIANT_NAMES[name]: (name,) for name in ("peft", "peft-bf16", "peft-compiled")},
    "eager PyTorch": ("eager", "addmm"),
}
PEERS_IN_MEMORY = ("peft-bf16", "eager", "addmm")


def summary(records: Records) -> str:
    """One table of ten rows at most, and the plots of a layer and of a model."""
    rows = []
    for what, belongs in SUMMARY:
        variants = by_variant(r for r in records if r["dtype"] == SUMMARY_DTYPE and belongs(r))
        floor = next((variants[name] for name in FLOORS if name in variants), None)
        if floor is None or "deltadiff" not in variants:
            continue
        ours = variants["deltadiff"]
        cells = [f"{floor['variant']} {floor['p50_ms']:.2f}", ratio(ours, bold=True)]
        for names in PEERS.values():
            cells.append(ratio(next((variants[n] for n in names if n in variants), None)))
        peer = next((variants[n] for n in PEERS_IN_MEMORY if n in variants), None)
        rows.append([what, shape_text(ours), *cells, gib(ours, ".2f"), gib(peer, ".2f")])
    header = ["what", "shape", "floor, ms", "deltadiff", *PEERS]
    header += ["GiB, deltadiff", "GiB, PEFT bf16 or eager"]
    shown = plots(records, RESULTS)
    figures = [
        image(plot.title, path, FRONT)
        for path, plot in shown.items()
        if path.name.startswith(("layer-", "model-"))
    ]
    title = f"**{SUMMARY_GPU}**, {SUMMARY_DTYPE}, median times over that of the floor:"
    return "\n" + "\n\n".join([title, markdown_table(header, *rows), *figures]) + "\n"


# ------------------------------------------------------------------ documents


def measured(*ops: str) -> Callable[[dict], bool]:
    return lambda r: r["op"] in ops and "variant" in r


def recorded(op: str) -> Callable[[dict], bool]:
    """What a tool wrote of itself; rows of checks may be of what has the same name."""
    return lambda r: r["op"] == op and "op_suite" not in r


def tuned(r: dict) -> bool:
    """What a comparison with tuned learning rates left."""
    return r["op"] == "compare_difference" or bool(r.get("stage"))


Part = tuple[Callable[[Records], str], Callable[[dict], bool]]  # how to write it, of which records
DOCUMENTS: dict[Path, dict[str, Part]] = {
    FRONT: {"summary": (summary, lambda r: "variant" in r and r["gpu"] == SUMMARY_GPU)},
    ALL: {
        "checks": (checks_table, lambda r: "op_suite" in r),
        "verify": (verify_table, lambda r: "error" in r),
        "layer": (partial(by_machine, table=speed_table), measured("lora_linear")),
        "blocks": (partial(by_machine, table=block_table), measured("block")),
        "four bits": (
            partial(by_machine, table=speed_table),
            measured("lora_linear_4bit", "decode_4bit"),
        ),
        "fp8": (
            partial(by_machine, table=speed_table),
            measured("lora_linear_fp8", "decode_fp8"),
        ),
        "fp8 accuracy": (
            partial(by_machine, table=fp8_accuracy.tables),
            recorded("fp8_accuracy"),
        ),
        "step": (partial(by_machine, table=speed_table), measured(*STEP)),
        "model": (partial(by_machine, table=model_table), measured("model")),
        "whole step": (partial(by_machine, table=whole_step_table), measured("whole_step")),
        "search": (partial(by_machine, table=search_table), measured("search")),
        "scaling": (scaling_table, recorded("scaling")),
        "scaling expected": (expected_table, recorded("scaling")),
        "peft calls": (peft_calls_table, recorded("peft_call")),
        "several gpus": (several_gpus_table, recorded("several_gpus")),
        "families": (families_table, recorded("families")),
        "compare": (compare_tables, lambda r: recorded("compare")(r) and not r.get("stage")),
    },
    METHODS: {
        "verdicts": (claims.summary, tuned),
        "differences": (differences_picture, recorded("compare_difference")),
        "claims": (claims.page, tuned),
        "tuned": (partial(tuned_tables, write=table), lambda r: bool(r.get("stage"))),
        "rates": (partial(tuned_tables, write=rates_table), lambda r: bool(r.get("stage"))),
    },
}


def fill(text: str, parts: dict[str, Part], records: Records) -> str:
    """``text`` with what stands between the marks of each part written anew."""
    for name, (write, belongs) in parts.items():
        mine = [r for r in records if belongs(r)]
        body = write(mine) if mine else "not measured yet"
        body = f"\n{body}\n" if "\n" in body else body
        mark = re.compile(rf"(<!-- {name} -->).*?(<!-- end -->)", re.DOTALL)
        if not mark.search(text) and mine:
            raise SystemExit(f"there is no mark <!-- {name} --> for its table")
        text = mark.sub(lambda m, body=body: m[1] + body + m[2], text)
    return text


def main(argv: Sequence[str]) -> int:
    records = load()
    old = {path: path.read_text() for path in DOCUMENTS}
    new = {path: fill(text, DOCUMENTS[path], records) for path, text in old.items()}
    plotted = [r for r in records if "variant" in r or recorded("fp8_accuracy")(r)]
    if list(argv) == ["--check"]:
        stale = [path for path in DOCUMENTS if old[path] != new[path]]
        stale += stale_plots(plotted, RESULTS) + stale_differences(records)
        names = [str(path.relative_to(ROOT)) for path in stale]
        print(f"not up to date: {', '.join(names)}; run tables.py" if names else "up to date")
        return int(bool(names))
    for path, text in new.items():
        write_text(path, text)
    write_plots(plotted, RESULTS)
    write_differences(records)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
