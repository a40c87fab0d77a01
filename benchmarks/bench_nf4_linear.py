"""Layers over NF4 weights, and decoding those, beside bitsandbytes, PEFT and layers in bfloat16."""

import pytest
from conftest import DEVICE

from deltadiff.bench.four_bit import four_bit_cases

pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("case", four_bit_cases(DEVICE), ids=str)
def bench_nf4_linear(compare, case):
    compare(case)
