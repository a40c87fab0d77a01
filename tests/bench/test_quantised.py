"""`deltadiff bench layer --base nf4`: all variants over 4 bits compute the same layer."""

import json
import math

import pytest
import torch
from tiny_bench import KEYS
from tolerance import relative_error

from deltadiff.__main__ import main
from deltadiff.bench.layer import LAYERS
from deltadiff.bench.quantised import BASES, VARIANTS, decode_nf4_case, linear_nf4, quantised_cases
from deltadiff.bench.timing import compare
from deltadiff.ops.decode_4bit import FourBit, decode_4bit

for package in ("bitsandbytes", "peft", "matplotlib"):
    pytest.importorskip(package)


def test_layers_compute_the_same(randn):
    weight, factors = randn(32, 64), (randn(4, 64), randn(32, 4))
    decoded = decode_4bit(FourBit.of(linear_nf4(weight).weight), torch.float32)
    x, dy = randn(8, 64).requires_grad_(), randn(8, 32)

    def outputs(variant, weight):
        layer, pair = LAYERS[variant](weight, *factors, torch.float32)
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *pair], dy)]

    expected = outputs("eager", decoded)
    for name in BASES["nf4"].variants:
        for ours, eager in zip(outputs(name, weight), expected, strict=True):
            assert relative_error(ours, eager.detach().double()) < 2e-6, name


def test_decoding():
    case = decode_nf4_case(64, 128, torch.bfloat16, graph=False)
    records = compare(case, torch.device("cpu"), budget_s=0.01)
    assert [r["variant"] for r in records] == ["copy", "deltadiff-4bit", "bnb-4bit"]
    assert all(r["note"] is None and r["over_floor"] > 0 for r in records)
    assert records[0]["bytes"] == 64 * 128 * 2.5 + 64 * 128 / 64 + 4 * 64 * 128 / (64 * 256)


@pytest.mark.parametrize("base", BASES.values(), ids=str)
def test_on_a_gpu_the_host_is_left_out(base):
    """All cases are CUDA graphs there, and records say so; what reads a CPU's clock is not one."""
    shapes = [(8192, 4096, 4096)]
    for given in (None, shapes):
        for kind in ("cuda", "cpu"):
            cases = quantised_cases(base, torch.device(kind), given)
            assert {case.fields["graph"] for case in cases} == {kind == "cuda"}
    assert "graph" in str(quantised_cases(base, torch.device("cuda"), shapes)[0])


def test_the_command(tmp_path, capsys):
    argv = ["bench", "layer", "--device", "cpu", "--base", "nf4", "--quick", "--output"]
    assert main([*argv, str(tmp_path), "--shapes", "16x64x32", "--ranks", "4"]) == 0
    (path,) = tmp_path.iterdir()
    records = json.loads(path.read_text())
    assert path.name.startswith("lora_linear_4bit-") and len(records) == 2 * len(VARIANTS)
    for r in records:
        assert r.keys() >= KEYS and math.isfinite(r["over_floor"]) and r["note"] is None
    assert main([*argv, str(tmp_path), "--dtype", "float16"]) == 2
    assert "--dtype: got float16" in capsys.readouterr().err
