"""`deltadiff bench layer --base`: all variants over few bits compute the same layer."""

import json
import math

import pytest
import torch
from tiny_bench import KEYS
from tolerance import relative_error

from deltadiff.__main__ import main
from deltadiff.bench.layer import LAYERS
from deltadiff.bench.quantised import (
    BASES,
    decode_fp8_case,
    decode_nf4_case,
    linear_fp8,
    linear_nf4,
    quantised_cases,
)
from deltadiff.bench.timing import compare
from deltadiff.ops.backends import why_unavailable
from deltadiff.ops.decode_4bit import FourBit, decode_4bit
from deltadiff.ops.decode_fp8 import Float8, decode_fp8

for package in ("bitsandbytes", "peft", "matplotlib"):
    pytest.importorskip(package)


def test_layers_compute_the_same(randn):
    factors = randn(4, 64), randn(32, 4)
    weight, x, dy = randn(32, 64), randn(8, 64).requires_grad_(), randn(8, 32)
    decoded = {
        "nf4": decode_4bit(FourBit.of(linear_nf4(weight).weight), torch.float32),
        "fp8": decode_fp8(Float8.of(linear_fp8(weight)), torch.float32),
    }

    def outputs(variant, weight):
        layer, pair = LAYERS[variant](weight, *factors, torch.float32)
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *pair], dy)]

    for name, base in BASES.items():
        expected = outputs("eager", decoded[name])
        for variant in set(base.variants) - set(base.on_sm_90):
            for ours, eager in zip(outputs(variant, weight), expected, strict=True):
                assert relative_error(ours, eager.detach().double()) < 2e-6, variant


@pytest.mark.gpu
def test_layers_of_fp8_compute_about_the_same(randn):
    device = torch.device("cuda", torch.cuda.current_device())
    if why_unavailable("fp8", device, torch.bfloat16):
        pytest.skip("products in FP8 need sm_90")
    how = {"dtype": torch.bfloat16, "device": device}
    weight, x, dy = (
        randn(256, 512, scale=512**-0.5, **how),
        randn(512, 512, **how),
        randn(512, 256, **how),
    )
    found = {}
    for name in ("frozen", "frozen-fp8"):
        layer, _ = LAYERS[name](weight, randn(8, 512), randn(256, 8), torch.bfloat16)
        y = layer(x.requires_grad_())
        found[name] = [y, *torch.autograd.grad(y, x, dy)]
    for ours, theirs in zip(found["frozen-fp8"], found["frozen"], strict=True):
        assert 1e-3 < relative_error(ours, theirs.detach().double()) < 0.06  # 3 bits of mantissa
    for case in quantised_cases(BASES["fp8"], device, [(512, 512, 256)], [8]):
        assert all(r["note"] is None for r in compare(case, device, budget_s=0.01))


def test_decoding_fp8():
    case = decode_fp8_case(64, 128, torch.bfloat16, graph=False)
    records = compare(case, torch.device("cpu"), budget_s=0.01)
    assert [r["variant"] for r in records] == ["copy", "deltadiff-fp8-decoded"]
    assert all(r["note"] is None and r["over_floor"] > 0 for r in records)
    assert records[0]["bytes"] == 64 * 128 * 3 + 4 * 64 * 128 / 128**2


def test_decoding():
    case = decode_nf4_case(64, 128, torch.bfloat16, graph=False)
    records = compare(case, torch.device("cpu"), budget_s=0.01)
    assert [r["variant"] for r in records] == ["copy", "deltadiff-4bit", "bnb-4bit"]
    assert all(r["note"] is None and r["over_floor"] > 0 for r in records)
    assert records[0]["bytes"] == 64 * 128 * 2.5 + 64 * 128 / 64 + 4 * 64 * 128 / (64 * 256)


@pytest.mark.parametrize("base", BASES.values(), ids=BASES)
def test_on_a_gpu_the_host_is_left_out(base, monkeypatch):
    """All cases are CUDA graphs there, and records say so; what reads a CPU's clock is not one."""
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    shapes = [(8192, 4096, 4096)]
    for given in (None, shapes):
        for kind in ("cuda", "cpu"):
            cases = quantised_cases(base, torch.device(kind), given)
            assert {case.fields["graph"] for case in cases} == {kind == "cuda"}
    assert "graph" in str(quantised_cases(base, torch.device("cuda"), shapes)[0])


@pytest.mark.parametrize("name", BASES)
def test_the_command(name, tmp_path, capsys):
    argv = ["bench", "layer", "--device", "cpu", "--base", name, "--quick", "--output"]
    assert main([*argv, str(tmp_path), "--shapes", "16x64x32", "--ranks", "4"]) == 0
    (path,) = tmp_path.iterdir()
    records, base = json.loads(path.read_text()), BASES[name]
    assert path.name.startswith(f"{base.op}-")
    assert len(records) == 2 * (2 + len(base.variants) - len(base.on_sm_90))
    for r in records:
        assert r.keys() >= KEYS and math.isfinite(r["over_floor"]) and r["note"] is None
    assert main([*argv, str(tmp_path), "--dtype", "float16"]) == 2
    assert "--dtype: got float16" in capsys.readouterr().err
