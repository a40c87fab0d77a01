"""`deltadiff verify` must be able to fail: `gated_mlp` and `rms_norm`, wrong by a little."""

import pytest
import torch

from deltadiff.ops import gated_mlp as op
from deltadiff.ops import rms_norm as norm
from deltadiff.verify.run import run


def failed():
    rows, ok = run("cpu", ["gated_mlp"], quick=True, seed=4)
    wrong = {row.output for row in rows if not row.ok}
    assert ok != bool(wrong)
    return wrong


def test_the_right_block_passes():
    assert failed() == set()


@pytest.mark.parametrize("slope", [0.99, 1.01])
def test_a_wrong_derivative_of_the_activation_fails(slope, monkeypatch):
    real = op.gated_product_bwd

    def harmed(e, g, dh, activation, de, dg):
        real(e, g, dh, activation, de, dg)
        de.mul_(slope)

    monkeypatch.setattr(op, "gated_product_bwd", harmed)
    assert {"dx", "dA"} <= failed() <= {"dx", "dA", "dB", "dgate", "dbias"}


def test_an_input_that_is_made_again_wrongly_fails(monkeypatch):
    real = norm.rms_norm_again_ref
    monkeypatch.setattr(norm, "rms_norm_again_ref", lambda *args: real(*args) * 1.02)
    assert {"dA"} <= failed() <= {"dA", "dgate"}  # the C++ kernels compute that from x, too


def test_a_result_that_differs_from_run_to_run_fails(monkeypatch):
    real, count = op.gated_product, iter(range(10**6))

    def harmed(e, g, activation):
        h = real(e, g, activation)
        h.view(-1)[0] += 1e-3 * (next(count) % 3)
        return h

    monkeypatch.setattr(op, "gated_product", harmed)
    assert "run to run" in failed()
    assert torch.is_grad_enabled()
