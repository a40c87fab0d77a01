"""Blocks in `deltadiff bench layer`: all variants compute the same, and the lean ones are lean."""

import json

import pytest
import torch
from tiny_bench import KEYS
from tolerance import relative_error

from deltadiff.__main__ import main
from deltadiff.bench.blocks import MAKERS, SMALL, VARIANTS, block_cases, build_block
from deltadiff.layers.lean.swap import lean_rows

for package in ("transformers", "peft"):
    pytest.importorskip(package)


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_variants_compute_the_same(shape, randn):
    weights = {name: randn(n, k, scale=k**-0.5) for name, (n, k) in shape.layers.items()}
    pairs = {name: (randn(4, k), randn(n, 4)) for name, (n, k) in shape.layers.items()}
    x = randn(8, shape.hidden).requires_grad_()
    dys, found = None, {}
    for name in VARIANTS:
        call, trained = MAKERS[name](build_block(shape, weights), pairs, torch.float32)
        assert len(trained) == (0 if name == "frozen" else 2 * len(weights))
        ys = call(x)
        assert sum(y.shape[1] for y in ys) == shape.out
        dys = dys or [randn(*y.shape) for y in ys]
        found[name] = [*ys, *torch.autograd.grad(ys, [x, *trained], dys)]
    for name in set(VARIANTS) - {"frozen", "peft"}:
        for ours, theirs in zip(found[name], found["peft"], strict=True):
            assert relative_error(ours, theirs.detach().double()) < 2e-6, name
    assert relative_error(found["frozen"][0], found["peft"][0].detach().double()) > 0.1


@pytest.mark.parametrize("shape", SMALL, ids=lambda shape: shape.name)
def test_what_is_called_lean_is_lean(shape, randn):
    weights = {name: randn(n, k) for name, (n, k) in shape.layers.items()}
    pairs = {name: (randn(4, k), randn(n, 4)) for name, (n, k) in shape.layers.items()}
    for name, count in (("deltadiff", 1), ("deltadiff-layers", 0)):
        block = build_block(shape, weights)
        MAKERS[name](block, pairs, torch.float32)
        rows = lean_rows(block)
        assert len(rows) == count and not any(row.why_not for row in rows)


def test_cases_of_a_gpu_are_graphs_of_the_sizes_of_llama():
    cases = block_cases(torch.device("cuda"))
    assert all(case.fields["graph"] for case in cases) and cases[0].fields["shape"]["M"] == 8192
    sizes = {case.fields["block"]: case.fields["flops"] for case in cases[:2]}
    frozen = {"q, k, v": 4096 * (4096 + 2 * 1024), "gated MLP": 3 * 4096 * 14336}
    for name, weights in frozen.items():
        assert 1 < sizes[name] / (4 * 8192 * weights) < 1.05


def test_the_command(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    argv = ["bench", "layer", "--device", "cpu", "--blocks", "--quick"]
    assert main([*argv, "--output", str(tmp_path)]) == 0
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert path.name.startswith("block-") and len(records) == 2 * len(VARIANTS)
    assert all(r.keys() >= KEYS | {"block"} and r["note"] is None for r in records)
    assert main([*argv, "--ranks", "4"]) == 2
    assert "--blocks: got --ranks beside it" in capsys.readouterr().err
