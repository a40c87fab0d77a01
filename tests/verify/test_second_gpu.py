"""Everything that belongs to cuda:1 stays there while cuda:0 is current."""

import pytest
import torch
from op_paths import BF16, F32, OpPath
from repeated_calls import CALLS, same
from torch import nn

from deltadiff.ops.backends import why_unavailable
from deltadiff.optim.fused_adamw import FusedAdamW

FIRST, SECOND = torch.device("cuda", 0), torch.device("cuda", 1)
two_gpus = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")


def allocated_on_first() -> int:
    """Bytes that have ever been taken from the first GPU by PyTorch."""
    torch.cuda.synchronize(FIRST)
    return torch.cuda.memory_stats(FIRST).get("allocated_bytes.all.allocated", 0)


@pytest.mark.gpu
@two_gpus
@pytest.mark.parametrize("backend", ["triton", "hopper"])
@pytest.mark.parametrize("op", CALLS)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_an_operation_runs_where_its_tensors_are(op, dtype, backend):
    if backend == "hopper" and op != "lora_linear":
        pytest.skip("the sm_90 kernel is for lora_linear without dropout alone")
    if reason := why_unavailable(backend, SECOND, dtype):
        pytest.skip(reason)
    with torch.cuda.device(FIRST):
        tokens = {"tokens": 600} if op.startswith("lora_linear") else {}
        expected = CALLS[op](OpPath(FIRST, backend), dtype, 3, size=256, **tokens)()
        run = CALLS[op](OpPath(SECOND, backend), dtype, 3, size=256, **tokens)
        before = allocated_on_first()
        found = run()
        assert allocated_on_first() == before
        assert torch.cuda.current_device() == 0
    assert {t.device for t in found} == {SECOND}
    assert same([t.cpu() for t in found], [t.cpu() for t in expected])


@pytest.mark.gpu
@two_gpus
def test_an_optimizer_with_parameters_on_both():
    """Each parameter takes the step that it takes in an optimizer of its own."""
    values = [torch.randn(64, 40), torch.randn(7)]
    grads = [torch.randn(64, 40), torch.randn(7)]

    def steps(places):
        params = [nn.Parameter(v.to(d)) for v, d in zip(values, places, strict=True)]
        optimizer = FusedAdamW(params, lr=0.1, weight_decay=0.1)
        for scale in (1.0, 2.0, -1.0):
            for p, g in zip(params, grads, strict=True):
                p.grad = scale * g.to(p.device)
            optimizer.step()
        assert [p.device for p in params] == list(places)
        for p in params:
            assert {t.device for t in optimizer.state[p].values()} == {p.device}
        return [p.detach().cpu() for p in params]

    with torch.cuda.device(FIRST):
        both, one = steps((FIRST, SECOND)), steps((FIRST, FIRST))
    assert same(both, one)
