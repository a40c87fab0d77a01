"""Which layers of many model families `swap_` takes, and why it takes no others.

python benchmarks/model_families.py    writes results/model-families.json

What can have a pair is found on a tiny model of the family. How much of the weight that is, is
counted on the family's default configuration, whose model gets no memory for its weights.
"""

import re
import sys
import warnings
from collections import Counter
from pathlib import Path

from torch import Tensor, nn

from deltadiff import swap_, swap_report
from deltadiff.devices import package_versions
from deltadiff.files import write_records
from deltadiff.layers.report import SwapReport

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "support"))  # the tiny models

from families import FAMILIES, Family
from family_runs import (
    all_linear,
    fused_layers,
    run,
    swapped,
    takes_all_linear,
    why_not_fused,
)

RESULT = Path(__file__).parent / "results" / "model-families.json"
VERSIONS = ("torch", "transformers", "peft")
ADAPTED = "adapted"


def main() -> None:
    versions = {name: package_versions()[name] for name in VERSIONS}
    write_records(RESULT, [{**record(family), **versions} for family in FAMILIES.values()])


def record(family: Family) -> dict:
    """What is covered in the models of a family, without the versions that this depends on.

    ``shares`` has the share of the model's weight for each reason why it is not adapted, the
    largest first, and for what is adapted. ``fused`` of ``peft_layers`` layers of a PEFT model
    run `lora_linear`; ``others`` counts the rest by reason.
    """
    model, real = swapped(family), family.build_default()
    kinds = {pattern(name): kind for name, kind in kinds_of_weight(model, swap_report(model))}
    weights: Counter[str] = Counter()
    layers = 0
    for name, p in real.named_parameters():
        kind = kinds[pattern(name)]
        weights[kind] += p.numel()
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


def pattern(name: str) -> str:
    """A parameter's name without its place in a list."""
    return re.sub(r"(?<=\.)\d+(?=\.)", "*", name)


def kinds_of_weight(model: nn.Module, report: SwapReport) -> list[tuple[str, str]]:
    """For each parameter of a swapped model its name, and `ADAPTED` or why it is not."""
    adapted = {f"{row.module}.weight" for row in report.rows}
    head = model.get_output_embeddings()
    found = []
    for name, p in model.named_parameters():
        owner, _, last = name.rpartition(".")
        if last not in ("lora_A", "lora_B"):
            kind = ADAPTED if name in adapted else _kind(model.get_submodule(owner), p, head)
            found.append((name, kind))
    return found


def _kind(owner: nn.Module, p: Tensor, head: nn.Module | None) -> str:
    if owner is head and p.ndim == 2:
        return "the output head"
    if isinstance(owner, nn.Linear) and p.ndim == 2:
        return "linear layers that cannot have a pair"
    if p.numel() == max(p.shape, default=1):
        return "norms, biases and other vectors"
    if isinstance(owner, nn.Embedding):
        return "embeddings"
    if isinstance(owner, nn.Conv1d | nn.Conv2d | nn.Conv3d):
        return "convolutions"
    name = type(owner).__name__
    return "experts" if "Experts" in name else f"parameters of {name}"


def in_peft(family: Family) -> dict:
    """How many of the layers of PEFT's own model are fused when that is swapped."""
    model = all_linear(family)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "no layer of this model became faster")
        report = swap_(model)
    with fused_layers(model) as fused:
        run(model, family.inputs())
    others = why_not_fused(family, model, report, fused)
    return {
        "peft_all_linear": takes_all_linear(family),
        "peft_layers": len(fused) + len(others),
        "fused": len(fused),
        "others": dict(Counter(others.values()).most_common()),
    }


if __name__ == "__main__":
    main()
