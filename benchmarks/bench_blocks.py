"""q, k and v behind a norm, and a gated MLP, beside PEFT and frozen blocks: time and memory."""

import pytest
from conftest import DEVICE

from deltadiff.bench.blocks import block_cases

pytest.importorskip("transformers")


@pytest.mark.parametrize("case", block_cases(DEVICE), ids=str)
def bench_block(compare, case):
    compare(case)
