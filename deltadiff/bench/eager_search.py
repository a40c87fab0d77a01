"""A step of DiffoRA's search as one writes it in PyTorch, the peer of `Search`."""

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from ..diffora.candidates import find_candidates

R, ALPHA = 4, 16.0
PAIR_OPTIONS = {"lr": 5e-4, "betas": (0.9, 0.999), "weight_decay": 0.01}  # AdamW, A and B
GATE_OPTIONS = {"lr": 1e-2, "betas": (0.5, 0.999), "weight_decay": 1e-3}  # Adam, the logits


class EagerLinear(nn.Module):
    """y = x W^T + bias + s g (x A^T) B^T (DiffoRA, eq. 10) around a frozen linear layer.

    It is computed from left to right, so s and g scale the r columns of x A^T, not those of y.
    """

    def __init__(self, base: nn.Linear, adapter_dtype: torch.dtype):
        super().__init__()
        self.base, self.scaling, self.gate = base, ALPHA / R, None
        options = {"dtype": adapter_dtype, "device": base.weight.device}
        self.lora_A = nn.Parameter(torch.empty(R, base.in_features, **options))
        self.lora_B = nn.Parameter(torch.empty(base.out_features, R, **options))

    def forward(self, x: Tensor) -> Tensor:
        a, b = self.lora_A.to(x.dtype), self.lora_B.to(x.dtype)
        return self.base(x) + self.scaling * self.gate * (x @ a.T) @ b.T


class EagerSearch:
    """`Search` for models whose layers all have the same module types.

    It does not look for inf and NaN in losses and gradients, which `Search` does.
    """

    def __init__(self, model: nn.Module, adapter_dtype: torch.dtype):
        self.model, candidates = model, find_candidates(model)
        self.layers: dict[str, EagerLinear] = {}
        for name in candidates.places:
            self.layers[name] = EagerLinear(model.get_submodule(name), adapter_dtype)
            model.set_submodule(name, self.layers[name])
        randomise_pairs(self.layers.values())
        self.pairs = [p for layer in self.layers.values() for p in (layer.lora_A, layer.lora_B)]
        shape = len(candidates.layers), len(candidates.types)
        self.logits = nn.Parameter(torch.zeros(shape, device=self.pairs[0].device))
        self.optimizer = torch.optim.AdamW(self.pairs, **PAIR_OPTIONS, fused=True)
        self.gate_optimizer = torch.optim.Adam([self.logits], **GATE_OPTIONS, fused=True)

    def gate_step(self, loss: Callable[[], Tensor]) -> None:
        for p in self.pairs:
            p.requires_grad_(False)
        self._take(self.gate_optimizer, loss, self.logits.softmax(1))
        for p in self.pairs:
            p.requires_grad_(True)

    def inner_step(self, loss: Callable[[], Tensor]) -> None:
        self._take(self.optimizer, loss, self.logits.detach().softmax(1))

    def _take(self, optimizer, loss: Callable[[], Tensor], gates: Tensor) -> None:
        # One node for all entries: taking them one by one makes a gradient matrix for each.
        for layer, gate in zip(self.layers.values(), gates.flatten().unbind(), strict=True):
            layer.gate = gate
        loss().backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def randomise_pairs(layers: Iterable) -> None:
    """Fill A and B with the same noise in all variants: products with zeros would be faster."""
    torch.manual_seed(0)
    for layer in layers:
        layer.lora_A.normal_(std=0.02)
        layer.lora_B.normal_(std=0.02)
