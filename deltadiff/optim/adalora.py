"""AdaLoRA: W + s P Lambda Q, whose singular values share one budget (Zhang et al., ICLR 2023).

P (out, r), Lambda (r,) and Q (r, in) are ``lora_B``, ``gate`` and ``lora_A`` of a `LoraLinear`, so
a layer stays one call of `lora_linear`, whose backward pass also gives the gradient of Lambda.
Step t of the paper's Algorithm 1, with triplet i = (P_:i, lambda_i, Q_i:) and loss
L = C + gamma sum_k (||P_k^T P_k - I||^2 + ||Q_k Q_k^T - I||^2):

    I = |w dL/dw|                                        sensitivity of each entry w
    Ibar = beta1 Ibar + (1 - beta1) I                    smoothed
    Ubar = beta2 Ubar + (1 - beta2) |I - Ibar|           its uncertainty
    S_i = s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)  with s = Ibar Ubar
    P, Lambda, Q = AdamW(P, Lambda, Q)
    lambda_i = 0 unless S_i is one of the b(t) largest of the whole model

A masked triplet keeps its importance and goes on being trained, so it can come back until
t = T - t_f; from then on the choice stays. PEFT differs in four points: it takes I after the
optimizer step, not at the weights that the gradient belongs to; its regulariser is the mean of
norms, not the sum of squares; it divides by r + 1e-5; and it masks all triplets that tie at its
threshold, where here exactly b(t) stay, lowest index first.
"""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import asdict
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, check_number
from ..errors import ArgumentError
from ..layers.linear import refuse_peft
from ..layers.lora_linear import LoraLinear
from ..layers.report import SwapReport
from ..layers.swap_gated import swap_gated_
from ..layers.targets.choose import Targets
from ..ranks import local, own_part, whole
from .adalora_budget import Schedule, largest
from .adalora_importance import Triplets
from .fused_adamw import FusedAdamW
from .param_groups import ModelOrParams, layer_names
from .saved_state import SavedState, same_values
from .zero_vectors import check_no_vectors

INITIAL_STD = 0.02  # standard deviation of P and Q at the start, as in the authors' code


def swap_adalora_(
    model: nn.Module,
    *,
    init_r: int = 12,
    lora_alpha: float | None = None,
    target_modules: Targets = "all-linear",
    adapter_dtype: torch.dtype | None = None,
    modules_to_save: Collection[str] = (),
    backend: str | None = None,
    seed: int | None = None,
) -> SwapReport:
    """`swap_` for AdaLoRA: P and Q are Gaussian, Lambda is zero.

    Args:
        init_r: the rank at the start, as r of `swap_`.
        lora_alpha: the increment is lora_alpha / init_r times P Lambda Q; None is init_r, so that
            the factor is 1, as in the paper.
        model, target_modules, adapter_dtype, modules_to_save, backend, seed: as for `swap_`.

    Raises:
        ArgumentTypeError, ArgumentError, BackendUnavailableError: as for `swap_`, and for a model
            with PEFT's layers; nothing was changed.
    """
    check_int("init_r", init_r, 1)
    return swap_gated_(
        model, "AdaLoRA", r=init_r, lora_alpha=lora_alpha, seed=seed, gate=(init_r,),
        std=INITIAL_STD, target_modules=target_modules, adapter_dtype=adapter_dtype,
        modules_to_save=modules_to_save, backend=backend,
    )  # fmt: skip


class AdaLoRA(FusedAdamW):
    """AdamW on P, Lambda and Q, and the allocation of the budget (Algorithm 1 of AdaLoRA).

    All trainable parameters get AdamW, and param groups, LR schedulers, ``GradScaler`` and CUDA
    graphs work as with `FusedAdamW`. t counts, on the device, the steps that were not skipped.

        loss = model(**batch).loss + optimizer.orthogonality()

    Args:
        model_or_params, lr, betas, eps, weight_decay, skip_nonfinite: as for `FusedAdamW`.
        total_step, target_r, tinit, tfinal, deltaT: see `Schedule`.
        beta1, beta2: of the averages Ibar and Ubar, 0 <= beta < 1.
        orth_reg_weight: gamma >= 0, see `orthogonality`.
        model: where ``model_or_params`` holds bare parameters, the model they belong to.

    Raises:
        ArgumentTypeError, ArgumentError: an argument that cannot be used, by name; no layer of
            `swap_adalora_`, or only some parameters of one; a target_r above the average rank.
    """

    _methods = ("AdaLoRA",)
    _copied = (*FusedAdamW._copied, "schedule", "beta1", "beta2", "orth_reg_weight")

    def __init__(
        self,
        model_or_params: ModelOrParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        total_step: int,
        target_r: int = 8,
        tinit: int = 0,
        tfinal: int = 0,
        deltaT: int = 1,
        beta1: float = 0.85,
        beta2: float = 0.85,
        orth_reg_weight: float = 0.1,
        skip_nonfinite: bool = False,
        model: nn.Module | None = None,
    ):
        self.schedule = Schedule(total_step, target_r, tinit, tfinal, deltaT)
        for name, beta in (("beta1", beta1), ("beta2", beta2)):
            if check_number(name, beta, 0) >= 1:
                raise ArgumentError(name, beta, "a number in [0, 1)")
        self.beta1, self.beta2 = beta1, beta2
        self.orth_reg_weight = check_number("orth_reg_weight", orth_reg_weight, 0)
        self._model = model
        super().__init__(
            model_or_params, lr, betas, eps, weight_decay, skip_nonfinite=skip_nonfinite
        )

    def budget(self, t: int) -> int:
        """b(t): how many triplets of the model step t may keep."""
        return self.schedule.budget(t, self._first, self._target)

    def orthogonality(self) -> Tensor:
        """gamma sum_k (||P_k^T P_k - I||^2 + ||Q_k Q_k^T - I||^2), to be added to the loss.

        Where the parameters are sharded, all processes call it. Each computes the whole sum.

        Returns:
            A 0-dim tensor, float32 (float64 for float64 parameters).
        """
        device = self._triplets[0].device
        terms = [triplets.orthogonality().to(device) for triplets in self._triplets]
        return self.orth_reg_weight * torch.stack(terms).sum()

    def ranks(self) -> dict[str, int]:
        """How many singular values of each layer are not zero; waits for the device.

        Where they are sharded, all processes ask for it.
        """
        return {name: int((whole(gate) != 0).sum()) for name, gate in self._gates.items()}

    def _build(self) -> None:
        super()._build()
        found = self._find_layers()
        self._gates: dict[str, Tensor] = {name: m.adapter[2] for name, m in found.items()}
        layers = list(found.values())
        self._first = sum(m.r for m in layers)
        self._target = self.schedule.target_r * len(layers)
        if self._target > self._first:
            accepted = f"at most {self._first / len(layers):g}, the average rank at the start"
            raise ArgumentError("target_r", self.schedule.target_r, accepted)
        kinds: dict[tuple, list[int]] = defaultdict(list)
        for i, m in enumerate(layers):
            kinds[m.lora_A.shape, m.lora_B.shape, m.lora_A.dtype, m.lora_A.device].append(i)
        starts = list(accumulate((m.r for m in layers), initial=0))
        self._triplets: list[Triplets] = []
        places: list[int] = []
        for members in kinds.values():
            self._triplets.append(Triplets([layers[i] for i in members], self.state))
            places += [p for i in members for p in range(starts[i], starts[i + 1])]
        device = self._triplets[0].device
        # Of equal scores the first layer's in the model wins, but scores come in stacks by shape.
        self._in_model_order = torch.tensor(places).argsort().to(device)
        steps = range(self.schedule.total_step + 1)
        kept = [self.budget(t) if self.schedule.chooses(t) else self._first for t in steps]
        self._kept = torch.tensor(kept, device=device)  # by t, which only the device knows

    def _find_layers(self) -> dict[str, LoraLinear]:
        for model in self._modules:
            refuse_peft("AdaLoRA", model)
        mine = {p for group in self.param_groups for p in group["params"]}
        found: dict[str, LoraLinear] = {}
        for m, name in layer_names(self._modules).items():
            there = [p in mine for p in m.adapter]
            with_lambda = len(there) == 3 and m.adapter[2].shape == (m.r,)
            if not isinstance(m, LoraLinear) or not with_lambda or not any(there):
                continue
            if not all(there):
                given = f"not all of lora_A, lora_B and gate of {name}"
                raise ArgumentError("model_or_params", given, "all three")
            found[name] = m
        if not found:
            check_no_vectors(self._modules, mine)
            given, accepted = "no layer with a Lambda", "a model that `swap_adalora_` changed"
            raise ArgumentError("model_or_params", given, accepted)
        return found

    def _step(self) -> None:
        self._follow_groups()
        before = {device: t.clone() for device, t in self._iteration.items()}
        scale = getattr(self, "grad_scale", None)
        sensitivity = [triplets.sensitivity(scale) for triplets in self._triplets]
        super()._step()
        for triplets, now in zip(self._triplets, sensitivity, strict=True):
            t = self._iteration[triplets.device]
            measures = (t != before[triplets.device]) & (t <= self.schedule.last_choice)
            triplets.smooth(now, measures, self.beta1, self.beta2)
        device = self._triplets[0].device
        t = self._iteration[device].clamp(max=self.schedule.total_step)
        parts = [triplets.importance().flatten().to(device) for triplets in self._triplets]
        scores = torch.cat(parts)[self._in_model_order]
        kept = largest(scores, self._kept.index_select(0, t.view(1)))
        gates = list(self._gates.values())
        masks = kept.to(gates[0].dtype).split([g.numel() for g in gates])
        masks = [own_part(k, g).to(g.device, g.dtype) for k, g in zip(masks, gates, strict=True)]
        torch._foreach_mul_([local(g.detach()) for g in gates], masks)

    def _run_state(self) -> dict[str, Any]:
        return {**super()._run_state(), **asdict(self.schedule)}

    def _check_state(self, saved: SavedState) -> None:
        """As there; the schedule must be this one."""
        own = asdict(self.schedule)
        if "format" not in saved.run:
            older = (saved.older.get(name) for name in ("adalora", "delta_lora"))
            for entry in older:  # the iteration was there while AdaLoRA was built on DeltaLoRA
                saved.run = {**(entry if isinstance(entry, dict) else {}), **saved.run}
        given = {name: saved.run[name] for name in own if name in saved.run}
        if not same_values(given, own) or "iteration" not in saved.run:
            raise ArgumentError("state_dict", f"a schedule {given or None}", str(own))
        super()._check_state(saved)
