"""How much of the weight of many model families `swap_` adapts, and why not the rest.

python benchmarks/model_families.py    writes results/model-families.json

What is adapted, and why the rest is not, is what `swap_` reports on a tiny model of the family. The
weights are counted in the model of its default configuration, which gets no memory for them.
"""

import re
import sys
from collections import Counter
from collections.abc import Mapping
from pathlib import Path

from deltadiff import swap_
from deltadiff.devices import package_versions
from deltadiff.files import write_records
from deltadiff.layers.matrices import find_matrices
from deltadiff.layers.report import SwapReport

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models

from families import FAMILIES, Family
from family_runs import (
    OPTIONS,
    all_linear,
    fused_layers,
    peft_takes_all_linear,
    run,
    why_not_fused,
)

RESULT = Path(__file__).parent / "results" / "model-families.json"
VERSIONS = ("torch", "transformers", "peft")
ADAPTED, WHOLE = "adapted", "trained whole"


def main() -> None:
    versions = {name: package_versions()[name] for name in VERSIONS}
    write_records(RESULT, [{**record(family), **versions} for family in FAMILIES.values()])


def record(family: Family) -> dict:
    """What is covered in the models of a family, without the versions that this depends on.

    ``weights`` counts the elements of all matrices, ``layers`` those that are adapted. ``shares``
    has the share of the weight that is adapted or trained whole, and that of each reason for which
    the rest is not, the largest first. ``fused`` of ``peft_layers`` layers of a PEFT model run
    `lora_linear`; ``others`` counts the rest by reason.
    """
    model = family.build()
    report = swap_(model, **OPTIONS)
    kinds = kinds_of_weight(report)
    weights: Counter[str] = Counter()
    layers = 0
    for matrix in find_matrices(family.build_default()):
        kind = find_kind(matrix.name, kinds)
        weights[kind] += matrix.elements
        layers += kind == ADAPTED
    total = weights.total()
    return {
        "op": "families",
        "family": family.name,
        "model": type(model).__name__,
        "weights": total,
        "layers": layers,
        "shares": {kind: round(n / total, 6) for kind, n in weights.most_common()},
        **in_peft(family),
    }


def kinds_of_weight(report: SwapReport) -> dict[str, str]:
    """For the name of each matrix `ADAPTED`, `WHOLE` or why it is not; for heads, the head's."""
    kinds = {pattern(row.module): ADAPTED for row in report.rows}
    kinds |= {pattern(group.name): WHOLE for group in report.coverage.whole}
    kinds |= {pattern(g.name): general(g.reason) for g in report.coverage.left_out}
    return kinds


def find_kind(name: str, kinds: Mapping[str, str]) -> str:
    """The kind of a matrix, or of the head that it stands in."""
    parts = pattern(name).split(".")
    names = (".".join(parts[:length]) for length in range(len(parts), 0, -1))
    for known in names:
        if known in kinds:
            return kinds[known]
    raise KeyError(f"the tiny model has no {name}")


def pattern(name: str) -> str:
    """A name without places in lists."""
    return re.sub(r"(?<![^.])\d+(?![^.])", "*", name)


def general(reason: str) -> str:
    """A reason without the shapes and names of one model."""
    reason = re.sub(r", tied to .*|, not an nn.Linear", "", reason)
    return re.sub(r"^\([\d, ]+\) of | \([\d, ]+\)", "", reason)


def in_peft(family: Family) -> dict:
    """How many of the layers of PEFT's own model are fused when that is swapped."""
    model = all_linear(family)
    report = swap_(model)
    with fused_layers(model) as fused:
        run(model, family.inputs())
    others = why_not_fused(family, model, report, fused)
    return {
        "peft_named": not peft_takes_all_linear(family),
        "peft_layers": len(fused) + len(others),
        "fused": len(fused),
        "others": dict(Counter(others.values()).most_common()),
    }


if __name__ == "__main__":
    main()
