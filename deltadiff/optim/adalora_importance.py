"""`Triplets`: the importance of AdaLoRA's triplets, and their distance from orthogonality."""

from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from ..layers.lora_linear import LoraLinear
from ..ranks import is_sharded, local, shard_like, whole_stack


class Triplets:
    """The triplets of n layers of one shape, stacked so that one launch serves all of them.

    Where they are sharded, each process stacks its parts, and what needs whole triplets gathers
    each stack.

    Args:
        layers: layers with a P, Lambda and Q of one shape, dtype and device.
        state: the optimizer's. It gets "sensitivity" (Ibar) and "uncertainty" (Ubar) of each
            parameter, views into the stacks here; values that it already holds are kept.
    """

    def __init__(self, layers: list[LoraLinear], state: dict[Tensor, dict[str, Tensor]]):
        self.device = layers[0].lora_A.device
        self.params: dict[str, list[Tensor]] = {"P": [], "Lambda": [], "Q": []}
        for layer in layers:
            q, p, singular_values = layer.adapter
            self.params["P"].append(p)
            self.params["Lambda"].append(singular_values)
            self.params["Q"].append(q)
        self.dtype = wide_dtype(layers[0].lora_A.dtype)
        self.sensitivities = self._stack("sensitivity", state)
        self.uncertainties = self._stack("uncertainty", state)

    def _stack(self, name: str, state: dict[Tensor, dict[str, Tensor]]) -> dict[str, Tensor]:
        stacks = {}
        for part, params in self.params.items():
            shape = (len(params), *local(params[0]).shape)
            stacks[part] = torch.zeros(shape, dtype=self.dtype, device=self.device)
            for p, own in zip(params, stacks[part], strict=True):
                if name in state[p]:
                    own.copy_(local(state[p][name]))
                state[p][name] = shard_like(own, p)
        return stacks

    def orthogonality(self) -> Tensor:
        """sum_k ||P_k^T P_k - I||^2 + ||Q_k Q_k^T - I||^2, differentiable."""
        with torch.autocast(self.device.type, enabled=False):
            p, q = (self._whole(self.params[part]).to(self.dtype) for part in "PQ")
            eye = torch.eye(q.shape[1], dtype=self.dtype, device=self.device)
            return (p.mT @ p - eye).square().sum() + (q @ q.mT - eye).square().sum()

    def _whole(self, params: list[Tensor]) -> Tensor:
        parts: list[Any] = [p.to_local() if is_sharded(p) else p for p in params]
        return whole_stack(torch.stack(parts), params[0])

    def sensitivity(self, grad_scale: Tensor | None) -> dict[str, Tensor]:
        """I = |w dL/dw| of every entry; 0 where there is no gradient."""
        found = {}
        for part, params in self.params.items():
            parts = [local(p) for p in params]
            grads = [local(torch.zeros_like(p) if p.grad is None else p.grad) for p in params]
            product = torch.stack(parts).to(self.dtype) * torch.stack(grads).to(self.dtype)
            if grad_scale is not None:
                product /= grad_scale.to(self.device, non_blocking=True)
            found[part] = product.abs_()
        return found

    def smooth(self, now: dict[str, Tensor], measures: Tensor, beta1: float, beta2: float) -> None:
        """Take I of a step into Ibar and Ubar, unless the 0-dim tensor ``measures`` is False."""
        for part, current in now.items():
            mean, deviation = self.sensitivities[part], self.uncertainties[part]
            new = beta1 * mean + (1 - beta1) * current
            spread = beta2 * deviation + (1 - beta2) * (current - new).abs()
            mean.copy_(torch.where(measures, new, mean))
            deviation.copy_(torch.where(measures, spread, deviation))

    def importance(self) -> Tensor:
        """S (n, r), float32 (float64 stays)."""
        s = {
            part: whole_stack(mean * self.uncertainties[part], self.params[part][0])
            for part, mean in self.sensitivities.items()
        }
        return s["Lambda"] + s["P"].mean(dim=1) + s["Q"].mean(dim=2)
