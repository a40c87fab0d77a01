"""adamw_step_ on all adapter tensors of a model, against torch.optim.AdamW."""

import pytest
import torch

from deltadiff.ops import choose_path, run_adamw_step

HYPER = {"lr": 1e-4, "betas": (0.9, 0.999), "eps": 1e-8, "weight_decay": 0.01}


@pytest.mark.parametrize("wants_delta", [False, True], ids=["step", "step+delta"])
def bench_adamw_step(compare, device, wants_delta):
    """Bytes an element = 4 (4 reads: p, g, m, v; 3 writes: p, m, v; 1 more for the delta).

    About 15 FLOPs an element. The floor copies 4 float32 an element: 16 bytes read, 16 written.
    `run_adamw_step` is what the optimizer calls: its tensors were checked when they were added.
    PyTorch's optimizers do not yield the delta; they are the same in both cases.
    """
    layers, n, k, r = 64, 4096, 4096, 8

    def adapters(make):
        pairs = [(make((r, k), device=device), make((n, r), device=device)) for _ in range(layers)]
        return [t for pair in pairs for t in pair]

    params, grads = adapters(torch.randn), adapters(torch.randn)
    exp_avgs, exp_avg_sqs, deltas = (adapters(torch.zeros) for _ in range(3))
    nothing = [None] * len(params)
    steps = torch.zeros(len(params), device=device)
    backend = choose_path(device, torch.float32).backend
    numbers = (HYPER["lr"], *HYPER["betas"], HYPER["eps"], HYPER["weight_decay"])

    def fused():
        run_adamw_step(
            backend, params, grads, exp_avgs, exp_avg_sqs, steps, *numbers,
            deltas if wants_delta else nothing, nothing, None, None, None,
        )  # fmt: skip

    def torch_step(**how):
        ours = [p.clone().requires_grad_() for p in params]
        for p, g in zip(ours, grads, strict=True):
            p.grad = g
        optimizer = torch.optim.AdamW(ours, **HYPER, **how)
        return optimizer.step

    source = torch.randn(4, sum(p.numel() for p in params), device=device)
    target = torch.empty_like(source)
    compare(
        {
            "copy": lambda: target.copy_(source),
            "deltadiff": fused,
            "torch fused": torch_step(fused=True),
            "torch foreach": torch_step(foreach=True),
        },
        floor="copy", op="adamw_step", mode="step+delta" if wants_delta else "step",
        dtype=torch.float32, shape={"tensors": len(params), "M": None, "K": k, "N": n, "r": r},
    )  # fmt: skip
