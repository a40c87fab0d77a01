"""`deltadiff verify` must be able to fail: `decode_4bit`, wrong by a little or in one place."""

import pytest
import torch

from deltadiff.ops import lora_linear_passes
from deltadiff.verify import decode_4bit as verify_decode_4bit
from deltadiff.verify.run import run

real_decode, real_decoded = verify_decode_4bit.decode_4bit, lora_linear_passes.decoded


def one_bit(w):
    w.view(-1)[-1] *= 1 + 2 * torch.finfo(w.dtype).eps
    return w


def swapped_halves(w):
    return w.view(-1, 2).flip(1).reshape(w.shape) if w.numel() % 2 == 0 else one_bit(w)


@pytest.mark.parametrize("harm", [one_bit, swapped_halves])
def test_a_wrong_weight_fails(harm, monkeypatch):
    _, ok = run("cpu", ["decode_4bit"], quick=True, seed=3)
    assert ok

    def harmed(*args, **options):
        return harm(real_decode(*args, **options))

    monkeypatch.setattr(verify_decode_4bit, "decode_4bit", harmed)
    rows, ok = run("cpu", ["decode_4bit"], quick=True, seed=3)
    assert not ok and {row.output for row in rows if not row.ok} == {"W"}


def test_a_wrong_layer_fails(path, monkeypatch):
    if path.backend == "reference":
        pytest.skip("it decodes elsewhere")
    if path.backend == "triton" and path.device.type == "cpu":
        pytest.skip("Triton interprets, which is slow")

    def harmed(*args):
        return swapped_halves(real_decoded(*args))

    monkeypatch.setattr(lora_linear_passes, "decoded", harmed)
    rows, _ = run(path.device, ["decode_4bit"], path.backend, quick=True, seed=3)
    failed = {row.output for row in rows if row.ok is False}
    assert failed == {"dx", "y"}
