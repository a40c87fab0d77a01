"""`deltadiff bench layer`: all variants compute the same layer."""

import pytest
import torch

from deltadiff.bench.layer import LAYERS, layer_case
from deltadiff.bench.timing import compare


@pytest.mark.parametrize(
    "name", ["deltadiff", "deltadiff-fp32", "peft-swapped", "peft", "peft-bf16"]
)
def test_layers_compute_the_same(name, randint):
    if name.startswith("peft"):
        pytest.importorskip("peft")
    weight, lora_A, lora_B = randint(24, 16), randint(4, 16), randint(24, 4)
    x, dy = randint(8, 16).requires_grad_(), randint(8, 24)

    def outputs(variant):
        layer, factors = LAYERS[variant](weight, lora_A, lora_B, torch.float32)
        y = layer(x)
        return [y, *torch.autograd.grad(y, [x, *factors], dy)]

    for ours, eager in zip(outputs(name), outputs("eager"), strict=True):
        assert torch.equal(ours, eager)  # integers: every sum is exact


@pytest.mark.gpu
def test_every_layer_runs_as_a_cuda_graph():
    device = torch.device("cuda", torch.cuda.current_device())
    case = layer_case(64, 128, 128, 8, "forward+backward", torch.bfloat16, True)
    for r in compare(case, device, budget_s=0.01):
        assert r["note"] is None and r["host_ms"] > 0 and r["peak_mib"] is not None
