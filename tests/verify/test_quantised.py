"""`deltadiff verify` must be able to fail: weights of few bits, decoded wrong in one place."""

import pytest
import torch

from deltadiff.ops import lora_linear_passes
from deltadiff.verify import decode_4bit, decode_fp8
from deltadiff.verify.run import run

MODULES = {"decode_4bit": decode_4bit, "decode_fp8": decode_fp8}
real_decoded = lora_linear_passes.decoded


def one_bit(w):
    w.view(-1)[-1] *= 1 + 2 * torch.finfo(w.dtype).eps
    return w


def swapped_halves(w):
    return w.view(-1, 2).flip(1).reshape(w.shape) if w.numel() % 2 == 0 else one_bit(w)


@pytest.mark.parametrize("op", MODULES)
@pytest.mark.parametrize("harm", [one_bit, swapped_halves])
def test_a_wrong_weight_fails(harm, op, monkeypatch):
    _, ok = run("cpu", [op], quick=True, seed=3)
    assert ok
    real_decode = getattr(MODULES[op], op)

    def harmed(*args, **options):
        return harm(real_decode(*args, **options))

    monkeypatch.setattr(MODULES[op], op, harmed)
    rows, ok = run("cpu", [op], quick=True, seed=3)
    assert not ok and {row.output for row in rows if not row.ok} == {"W"}


@pytest.mark.parametrize("op", MODULES)
def test_a_wrong_layer_fails(op, path, monkeypatch):
    if path.backend == "reference":
        pytest.skip("it decodes elsewhere")
    if path.backend == "triton" and path.device.type == "cpu":
        pytest.skip("Triton interprets, which is slow")

    def harmed(*args):
        return swapped_halves(real_decoded(*args))

    monkeypatch.setattr(lora_linear_passes, "decoded", harmed)
    rows, _ = run(path.device, [op], path.backend, quick=True, seed=3)
    failed = {row.output for row in rows if row.ok is False}
    assert failed == {"dx", "y"}
