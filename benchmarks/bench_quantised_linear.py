"""Layers over quantised weights, and decoding those, beside peers and layers in bfloat16."""

import pytest
from conftest import DEVICE

from deltadiff.bench.quantised import BASES, quantised_cases

CASES = [
    pytest.param(case, base.package, id=f"{name} {case}")
    for name, base in BASES.items()
    for case in quantised_cases(base, DEVICE)
]


@pytest.mark.parametrize("case, package", CASES)
def bench_quantised_linear(compare, case, package):
    if package is not None:
        pytest.importorskip(package)
    compare(case)
