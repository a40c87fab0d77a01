"""Algorithm 1 of the Delta-LoRA paper in float64 and plain PyTorch, beside a model that is trained.

It knows tensors alone: A, B and the other trained parameters are the model's own, W is its own. It
computes every step itself, compares the result with the model's, and goes on from the model's, so
that roundings of a step do not add up. W is never set to the model's.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

STEPS = {torch.float64: 2.0**-40, torch.float32: 2.0**-19, torch.bfloat16: 2.0**-7}  # of AdamW


@dataclass
class Run:
    """One optimizer: its settings, which may change between steps, and its counts.

    Attributes:
        groups: parameter names to the settings of their group.
        t: steps that were not skipped; W is updated where t > start_step.
    """

    groups: list[tuple[list[str], dict]]
    t: int = 0
    moments: dict[str, tuple[int, Tensor, Tensor]] = field(default_factory=dict)


class Algorithm1:
    """W of each layer, as the algorithm has it.

    Args:
        weights: the weights before the first step, by the name of their layer.
        scaling: s.
    """

    def __init__(self, weights: dict[str, Tensor], scaling: float):
        self.weights = {name: w.detach().double().clone() for name, w in weights.items()}
        self.first = {name: w.clone() for name, w in self.weights.items()}
        self.scaling = scaling
        self.moments = torch.float64  # the least precise dtype that they have had

    def step(self, run: Run, before: dict[str, Tensor], after: dict[str, Tensor], grads) -> None:
        """One step of ``run``, which took the parameters ``before`` to ``after``.

        ``grads``: the gradients by name; a parameter without one is not among them.
        """
        if not all(g.isfinite().all() for g in grads.values()):
            assert all(torch.equal(before[name], after[name]) for name in before)
            return
        for names, settings in run.groups:
            for name in names:
                if name not in grads:
                    assert torch.equal(before[name], after[name]), name
                    continue
                expected = self._adamw(run, name, before[name].double(), grads[name], settings)
                error = (after[name].double() - expected).abs().max()
                size = max(1e-3, float(expected.abs().max()), settings["lr"])
                close = max(STEPS[after[name].dtype], STEPS[self.moments])
                assert error <= close * size, (name, float(error))
            for layer in self.weights:
                if f"{layer}.lora_B" in names and run.t > settings["start_step"]:
                    moved = product(after, layer) - product(before, layer)
                    self.weights[layer] += settings["update_ratio"] * self.scaling * moved
        run.t += 1

    def _adamw(self, run: Run, name: str, p: Tensor, grad: Tensor, settings: dict) -> Tensor:
        zero = torch.zeros_like(p)
        steps, m, v = run.moments.get(name, (0, zero, zero))
        (beta1, beta2), g = settings["betas"], grad.double()
        steps, m, v = steps + 1, beta1 * m + (1 - beta1) * g, beta2 * v + (1 - beta2) * g * g
        run.moments[name] = steps, m, v
        m_hat, v_hat = m / (1 - beta1**steps), v / (1 - beta2**steps)
        decayed = p * (1 - settings["lr"] * settings["weight_decay"])
        return decayed - settings["lr"] * m_hat / (v_hat.sqrt() + settings["eps"])

    def effective(self, layer: str, params: dict[str, Tensor]) -> Tensor:
        """The weight that the layer acts as: W + s B A."""
        return self.weights[layer] + self.scaling * product(params, layer)


def product(params: dict[str, Tensor], layer: str) -> Tensor:
    """B A of a layer in float64."""
    return params[f"{layer}.lora_B"].double() @ params[f"{layer}.lora_A"].double()
