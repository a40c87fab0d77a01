"""What the two papers claim, beside what was measured: the text of benchmarks/methods.md.

Every sentence follows from the intervals of paired differences (see `differences`). A claim
**holds** for a task where the whole interval is on its side of 0, **the opposite** holds where all
of it is on the other side, and else it is **not decided**.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

from ...text import markdown_table
from ..tasks.choose import METRIC_TITLES
from .report import differences_of, drawn, pair_text

HOLDS, OPPOSITE, OPEN = "holds", "the opposite holds", "not decided"
TASK_TITLES = {
    "sst2": "SST-2", "cola": "CoLA", "vader": "VADER's film reviews", "e2e": "E2E",
    "sst2-sweeps": "SST-2",
}  # fmt: skip


@dataclass(frozen=True)
class Claim:
    """A claim of a paper.

    Attributes:
        text: the claim in one sentence.
        source: where the paper makes it.
        tested_by: whether a difference tests it.
        sign: 1 where the claim says that the difference is above 0, -1 below.
        with_fewer: whether it also says that fewer parameters are trained.
    """

    text: str
    source: str
    tested_by: Callable[[dict], bool]
    sign: int = 1
    with_fewer: bool = False


def _between(method: str, control: str) -> Callable[[dict], bool]:
    """Differences between two methods, outside of sweeps."""
    wanted = (method, control, None)
    return lambda r: (r["method"], r["control"], r["sweep"]) == wanted


def _within(method: str, sweep: str) -> Callable[[dict], bool]:
    """Differences between a value of a sweep and its reference value."""
    wanted = (method, method, sweep)
    return lambda r: (r["method"], r["control"], r["sweep"]) == wanted


def _scale(r: dict) -> bool:
    """Delta-LoRA beside LoRA of the scale that it amounts to, also at each lambda of the sweep."""
    pair = r["method"], r["control"]
    return pair == ("delta-lora", "lora-alpha-control") and r["sweep"] in (None, "lambda")


CLAIMS = {
    "Delta-LoRA": (
        Claim("Delta-LoRA is better than LoRA.", "abstract", _between("delta-lora", "lora")),
        Claim(
            "The update of W does more than LoRA at alpha (1 + lambda), which is our control: with "
            "updates from the first step on, the two are the same under Adam.",
            "abstract: low-rank updates alone are inadequate", _scale,
        ),
        Claim(
            "Delta-LoRA is better than AdaLoRA.", "abstract", _between("delta-lora", "adalora")
        ),
        Claim("Any lambda above 0 is better than 0.", "table 8", _within("delta-lora", "lambda")),
        Claim(
            "Updates of W that start later (K above 0) are better than from the first step on.",
            "table 9", _within("delta-lora", "k"),
        ),
        Claim(
            "The low-rank path is better without dropout, which Delta-LoRA removes (measured on "
            "LoRA, which can have it).",
            "figure 2", lambda r: _within(r["method"], "dropout")(r), sign=-1,
        ),
    ),
    "DiffoRA": (
        Claim(
            "The searched modules are better than as many at random.", "table 3",
            lambda r: (r["method"], r["control"]) == ("diffora", "diffora-random"),
        ),
        Claim(
            "DiffoRA is better than LoRA at fewer parameters.", "tables 1 and 2",
            _between("diffora", "lora"), with_fewer=True,
        ),
        Claim(
            "DiffoRA is better than AdaLoRA.", "tables 1 and 2", _between("diffora", "adalora")
        ),
        Claim("DiffoRA is better than FLoRA.", "table 8", _between("diffora", "flora")),
        Claim(
            "Modules that were not selected are better sharing pairs than frozen.", "table 5",
            _within("diffora", "sharing"),
        ),
        Claim(
            "A sample rate of 0.5 is better than others.", "table 4",
            _within("diffora", "ratio"), sign=-1,
        ),
        Claim(
            "Selected pairs that start anew end better than those that go on from the search.",
            "algorithm 1, which starts anew", _within("diffora", "warm-start"), sign=-1,
        ),
    ),
}  # fmt: skip


def verdict(claim: Claim, r: dict) -> str:
    """What the interval of a difference says about a claim."""
    low, high = sorted((claim.sign * r["low"], claim.sign * r["high"]))
    return HOLDS if low > 0 else OPPOSITE if high < 0 else OPEN


def sentence(claim: Claim, found: Sequence[dict]) -> str:
    """What was found about a claim, in one sentence for each verdict."""
    if not found:
        return "**Not measured.**"
    words = []
    for kind in (HOLDS, OPPOSITE, OPEN):
        places = [where(r) for r in found if verdict(claim, r) == kind]
        if places:
            words.append(f"**{kind.capitalize()}** on {listed(places)}.")
    if claim.with_fewer:
        counts = [(r["trainable"], r["control_trainable"]) for r in found]
        fewer = [None not in pair and pair[0] < pair[1] for pair in counts]
        many = "all" if all(fewer) else "none" if not any(fewer) else "some"
        words.append(f"Fewer parameters were trained on {many} of these.")
    return " ".join(words)


def where(r: dict) -> str:
    """The task, the metric, and in a sweep the value."""
    place = f"{_title(r)} ({METRIC_TITLES[r['metric']]})"
    if r["sweep"] is None:
        return place
    method = " with alpha (1 + lambda)" if r["method"] == "lora-alpha-control" else ""
    return f"{place} at {r['sweep']} {r['x']:g}{method}"


def _title(r: dict) -> str:
    return TASK_TITLES.get(r["task"], r["task"])


def listed(words: Sequence[str]) -> str:
    """The words in a row: "a, b and c"."""
    *first, last = words
    return f"{', '.join(first)} and {last}" if first else last


def claim_text(paper: str, claim: Claim, records: Iterable[dict]) -> str:
    """A claim, what was found, and the differences that say so."""
    found = [r for r in differences_of(records) if claim.tested_by(r)]
    parts = [f"### {claim.text}", f"*{paper}, {claim.source}.* {sentence(claim, found)}"]
    header = ["task", "metric", "difference between", "means", "better by", "95 % interval"]
    rows = []
    for r in found:
        means = f"{r['mean']:.3f}, {r['control_mean']:.3f}"
        counts = (r["diverged"], r["control_diverged"])
        means += f" (diverged: {counts[0]}, {counts[1]})" if any(counts) else ""
        rows.append([
            _title(r), METRIC_TITLES[r["metric"]],
            " and ".join(pair_text(r)), means, f"{r['gain']:+.4f}",
            f"{r['low']:+.4f} to {r['high']:+.4f}",
        ])  # fmt: skip
        if claim.with_fewer:
            counts = (r["trainable"], r["control_trainable"])
            rows[-1].append(", ".join("" if n is None else f"{n:,.0f}" for n in counts))
    if claim.with_fewer:
        header.append("trained parameters")
    return "\n\n".join([*parts, markdown_table(header, *rows)] if rows else parts)


def page(records: Sequence[dict]) -> str:
    """All claims with what was found, paper by paper."""
    parts = []
    for paper, claims in CLAIMS.items():
        parts.append(f"## {paper}")
        parts += [claim_text(paper, claim, records) for claim in claims]
    return "\n\n".join(parts)


def summary(records: Sequence[dict]) -> str:
    """A table with a line for each claim: how many of its differences say what.

    Below it stand the tasks that were not measured.
    """
    rows = []
    for paper, claims in CLAIMS.items():
        for claim in claims:
            found = [r for r in differences_of(records) if claim.tested_by(r)]
            kinds = [verdict(claim, r) for r in found]
            counts = [str(kinds.count(kind)) if found else "" for kind in (HOLDS, OPPOSITE, OPEN)]
            rows.append([paper, claim.text, str(len(found) or "not measured"), *counts])
    measured = {r["task"] for r in differences_of(records)}
    missing = [
        f"the sweeps on {title}" if task.endswith("-sweeps") else title
        for task, title in TASK_TITLES.items()
        if task not in measured
    ]
    left = f"\n\nNot measured: {listed(missing)}." if missing else ""
    return markdown_table(["paper", "claim", "differences", HOLDS, OPPOSITE, OPEN], *rows) + left


def pictured(records: Iterable[dict]) -> dict[str, list[dict]]:
    """The differences of the picture, by task and metric: those that test a claim.

    Those of sweeps are left out.
    """
    claims = [claim for found in CLAIMS.values() for claim in found]
    panels: dict[str, list[dict]] = {}
    for r in differences_of(records):
        if r["sweep"] is None and any(claim.tested_by(r) for claim in claims):
            panels.setdefault(where(r), []).append(drawn(r))
    return panels
