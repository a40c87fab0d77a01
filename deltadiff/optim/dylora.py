"""DyLoRA: one pair that works at every rank b <= r (Valipour et al., EACL 2023).

Each step draws a rank b and trains the pair cut to it, so that the first rows of A and columns of B
learn what matters most:

    y = x W^T + (alpha / b) (x A[:b]^T) B[:, :b]^T          b ~ p_B on {r_min, ..., r_max}

The layer keeps its full pair. In training mode all layers share one gate, a tensor on the device
whose first b entries are r / b and whose others are 0. So a new rank is a copy of r numbers and
needs no compilation, and gradients beyond b are exactly 0. Everything else sees the largest rank:
evaluation mode, files, states, copies, `merge_`.

A zero gradient does not keep AdamW from moving a row, because of weight decay and momentum. The
paper trains the truncation only, so rows that a step does not train keep their values bit by bit.
Their moments do take in the zero gradient, as in torch.optim.AdamW, because its bias correction
counts every step: a row that is seldom drawn takes smaller steps, never larger ones.
"""

import contextlib
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ..checks import check_int, wide_dtype
from ..errors import ArgumentError, ArgumentTypeError, SwapError
from ..kernels.runtime.async_copy import copy_async
from ..kernels.runtime.gpu import is_capturing
from ..layers.gate import is_core
from ..layers.linear import refuse_peft
from ..layers.lora_linear import LoraLinear, check_unsharded, own_layers
from ..layers.report import SwapReport, swap_report
from ..ranks import check_alike, local, own_part
from .fused_adamw import FusedAdamW
from .param_groups import ModelOrParams, layer_names
from .saved_state import SavedState
from .zero_vectors import check_no_vectors

SCALES = ("alpha/b", "alpha/r")


class DyLoRA(FusedAdamW):
    """AdamW on the pairs of a swapped model, cut to a rank that is drawn for each step.

    All trainable parameters get AdamW, and param groups, LR schedulers, ``GradScaler`` and CUDA
    graphs work as with `FusedAdamW`. The first rank is drawn at once, each further one at the end
    of `step`, so that all batches whose gradients are accumulated see one rank. A captured step
    cannot draw: call `draw` between replays.

    As with dropout, it is training mode (`model.train()`) in which the layers have the drawn rank,
    with or without gradients, because activation checkpointing runs its first pass without. In
    evaluation mode they have rank ``r_max``, and so has all that is saved, copied or merged.

    Args:
        model_or_params, lr, betas, eps, weight_decay, skip_nonfinite: as for `FusedAdamW`; the
            model is on its device already, and its layers have one rank r.
        r_min, r_max: the ranks that are drawn; r_max None is r.
        distribution: p_B, a weight >= 0 for each of r_min to r_max; None is uniform.
        frozen: train row and column b alone, not all of the truncation (the paper's "frozen").
        scale: of the low-rank branch at rank b: "alpha/b" (the paper), or "alpha/r", with which
            the best pairs of all ranks agree in the rows that they share.
        seed: of the ranks, which are drawn on the host; the same in all processes.
        model: where ``model_or_params`` holds bare parameters, the model they belong to.

    Raises:
        ArgumentTypeError, ArgumentError: an argument that cannot be used, by name; no pairs, ranks
            that differ, or a layer with a gate of another method; nothing was changed.
    """

    _methods = ("DyLoRA",)
    _copied = (
        *FusedAdamW._copied, "r_min", "r_max", "frozen", "scale", "distribution", "rank",
        "_generator",
    )  # fmt: skip

    def __init__(
        self,
        model_or_params: ModelOrParams,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        *,
        r_min: int = 1,
        r_max: int | None = None,
        distribution: Sequence[float] | None = None,
        frozen: bool = False,
        scale: str = "alpha/b",
        seed: int = 0,
        skip_nonfinite: bool = False,
        model: nn.Module | None = None,
    ):
        check_int("r_min", r_min, 1)
        if r_max is not None:
            check_int("r_max", r_max, r_min)
        check_int("seed", seed, 0)
        _check_scale(scale)
        self.r_min, self.r_max, self.frozen, self.scale = r_min, r_max, frozen, scale
        self.distribution = distribution
        self.rank = 0  # until the first one is drawn
        # For each device and dtype: one vector, and its two halves, the gate and a mask that is 1
        # for rows that are trained.
        self._masks: dict[tuple[torch.device, torch.dtype], tuple[Tensor, Tensor, Tensor]] = {}
        self._generator = torch.Generator().manual_seed(seed)
        self._truncations = 0  # how many contexts of `truncated` are open
        self._model = model
        super().__init__(
            model_or_params, lr, betas, eps, weight_decay, skip_nonfinite=skip_nonfinite
        )
        check_alike("seed", seed, self._layers[0].lora_A)
        self.draw()

    def draw(self) -> int:
        """Draw the rank of the next step and send it to the device, without waiting for it."""
        index = torch.multinomial(self._weights, 1, generator=self._generator)
        self.rank = self.r_min + int(index)
        self._send_rank(self.rank)
        return self.rank

    @contextlib.contextmanager
    def truncated(self, b: int) -> Iterator[None]:
        """The model has rank b within this context, also in what is saved or merged there.

        Raises:
            ArgumentTypeError, ArgumentError: b is no rank of 1 to r; or `step` was called within.
        """
        rank = _check_rank(b, self._r)
        before = [(m, m.gate, m.training_gate) for m in self._layers]
        for m in self._layers:
            m.gate, m.training_gate = self._gate_of(rank, m), None
        self._truncations += 1
        try:
            yield
        finally:
            self._truncations -= 1
            for m, gate, training_gate in before:
                if m.r == self._r:  # `truncate_` was not called within
                    m.gate, m.training_gate = gate, training_gate

    def _build(self) -> None:
        super()._build()
        self._layers = layers = self._find_layers()
        self._r = layers[0].r
        self.r_max = self._r if self.r_max is None else self.r_max
        if self.r_max > self._r:
            raise ArgumentError("r_max", self.r_max, f"at most {self._r}, the rank of the layers")
        self._weights = _check_distribution(self.distribution, self.r_max - self.r_min + 1)
        stacks: dict[tuple, list[Tensor]] = defaultdict(list)  # (is B, shape, ...) -> parameters
        for m in layers:
            key = m.lora_A.device, wide_dtype(m.lora_A.dtype)
            if key not in self._masks:
                rows = torch.zeros(2 * self._r, dtype=key[1], device=key[0])
                self._masks[key] = rows, *rows.view(2, -1)
            m.training_gate = self._masks[key][1]
            for is_B, p in ((False, m.lora_A), (True, m.lora_B)):
                stacks[is_B, p.shape, p.dtype, key].append(p)
        self._stacks = []
        for (is_B, _, _, key), params in stacks.items():
            trained = self._masks[key][2]
            trained = trained if is_B else own_part(trained, params[0]).view(-1, 1)
            self._stacks.append((params, trained))
        self._use_largest_rank()
        if self.rank:  # not the first call: the layers moved, and their masks are new
            self._send_rank(self.rank)

    def _use_largest_rank(self) -> None:
        """Give the layers the gate that they have outside of training."""
        assert self.r_max is not None  # `_build` sets it
        for m in self._layers:
            m.gate = self._gate_of(self.r_max, m)

    def _gate_of(self, b: int, layer: LoraLinear) -> Tensor | None:
        """A gate that cuts a layer to rank b; None where that changes nothing."""
        if b == self._r:
            return None
        gate = torch.zeros(
            self._r, dtype=wide_dtype(layer.lora_A.dtype), device=layer.lora_A.device
        )
        gate[:b] = self._scale_at(b)
        return gate

    def _scale_at(self, b: int) -> float:
        """What the branch is multiplied by at rank b, beside the layer's scaling."""
        return self._r / b if self.scale == "alpha/b" else 1.0

    def _find_layers(self) -> list[LoraLinear]:
        for model in self._modules:
            refuse_peft("DyLoRA", model)
        mine = {p for group in self.param_groups for p in group["params"]}
        known = layer_names(self._modules)
        layers = {
            m: name
            for m, name in known.items()
            if isinstance(m, LoraLinear) and (m.lora_A in mine or m.lora_B in mine)
        }
        if not layers:
            check_no_vectors(self._modules, mine)
            accepted = "a model that `swap_` changed, or model="
            raise ArgumentError("model_or_params", "no pair of a swapped layer", accepted)
        for m, name in layers.items():
            if not (m.lora_A in mine and m.lora_B in mine):
                given = f"only one of lora_A and lora_B of {name}"
                raise ArgumentError("model_or_params", given, "both")
            if m.gate is not None and (m.gate.requires_grad or m.gate.shape != (m.r,)):
                given = f"{name} with a gate of another method"
                raise ArgumentError("model_or_params", given, "layers without a gate")
        ranks = sorted({m.r for m in layers})
        if len(ranks) > 1:
            raise ArgumentError("model_or_params", f"layers of ranks {ranks}", "layers of one rank")
        return list(layers)

    def _send_rank(self, b: int) -> None:
        for rows, _, _ in self._masks.values():
            values = torch.zeros(rows.shape, dtype=rows.dtype)
            gate, trained = values.view(2, -1)
            gate[:b] = self._scale_at(b)
            trained[b - 1 if self.frozen else 0 : b] = 1.0
            copy_async(values, rows)

    def _check_trained(self) -> None:
        """Raise where the gradients cannot be those of the drawn rank."""
        if self._truncations:
            raise ArgumentError("step", "a call inside of `truncated`", "steps at the drawn rank")
        for m in self._layers:
            if not m.training and m.lora_A.grad is not None:
                given = f"gradients in evaluation mode, in which the layers have rank {self.r_max}"
                raise ArgumentError("step", given, "training mode: `model.train()`")

    def _step(self) -> None:
        self._follow_groups()
        self._check_trained()
        stacks = self._stacks
        if self.frozen:
            for params, trained in stacks:
                grads = [local(p.grad) for p in params if p.grad is not None]
                if grads:
                    kept = torch.where(trained != 0, torch.stack(grads), 0)
                    torch._foreach_copy_(grads, list(kept.unbind()))
        before = [torch.stack([*map(local, params)]) for params, _ in stacks]
        super()._step()
        for (params, trained), old in zip(stacks, before, strict=True):
            parts = [local(p.detach()) for p in params]
            kept = torch.where(trained != 0, torch.stack(parts), old)
            torch._foreach_copy_(parts, list(kept.unbind()))
        if not any(map(is_capturing, self._devices)):
            self.draw()

    def _run_state(self) -> dict[str, Any]:
        """With the drawn rank, and the generator of those to come.

        torch.distributed takes states whose tensors lie on one device.
        """
        generator = self._generator.get_state().to(self._layers[0].lora_A.device)
        drawn = {"rank": self.rank, "generator": generator, "r": self._r}
        return {**super()._run_state(), **drawn}

    def _check_state(self, saved: SavedState) -> None:
        """As there; the layers must have the rank that they had."""
        if "format" not in saved.run:
            older = saved.older.get("dylora")
            if not isinstance(older, dict):
                given, accepted = "no DyLoRA state", f"a DyLoRA state of rank {self._r}"
                raise ArgumentError("state_dict", given, accepted)
            saved.run |= older
        if saved.number("r", 1) != self._r:
            given = f"a state of rank {saved.run['r']}"
            raise ArgumentError("state_dict", given, f"a DyLoRA state of rank {self._r}")
        saved.run["rank"] = _check_rank(saved.number("rank", 1), self._r)
        generator = saved.run.get("generator")
        try:
            saved.run["generator"] = torch.Generator()
            saved.run["generator"].set_state(generator.cpu())  # type: ignore[union-attr]
        except (AttributeError, RuntimeError, TypeError, ValueError) as error:
            given, accepted = type(generator).__name__, "the state of a generator on the CPU"
            raise ArgumentError("generator in state_dict", given, accepted) from error
        super()._check_state(saved)

    def _take_state(self, saved: SavedState) -> None:
        super()._take_state(saved)
        self._generator = saved.run["generator"]
        self.rank = saved.run["rank"]
        self._send_rank(self.rank)
        self._use_largest_rank()  # adapters of earlier versions hold the mask of a drawn rank

    def _become_copy(self, attributes: dict[str, Any]) -> None:
        self._masks, self._truncations = {}, 0
        super()._become_copy(attributes)


@torch.no_grad()
def truncate_(model: nn.Module, b: int, *, scale: str = "alpha/b") -> SwapReport:
    """Cut the pairs of a trained model to rank b, for good: ordinary LoRA layers without a gate.

    They can be saved as an adapter of rank b or merged. The pairs are new parameters, which the
    optimizer that trained the old ones does not hold.

    Args:
        model: a swapped model.
        b: 1 to the smallest rank of its layers.
        scale: the one that `DyLoRA` was trained with.

    Raises:
        ArgumentTypeError, ArgumentError: an argument that cannot be used, by name.
        SwapError: no swapped layer; a layer of PEFT, of AdaLoRA or FLoRA, or with a Delta-LoRA
            update; a model that FSDP shards; nothing was changed.
    """
    layers = own_layers(model, "truncate_", "PEFT's own calls")
    check_unsharded(layers, "truncate_")
    _check_rank(b, min(m.r for m in layers.values()))
    _check_scale(scale)
    for name, m in layers.items():
        if m.delta is not None or isinstance(m.gate, nn.Parameter) or is_core(m.gate):
            given = "a layer of AdaLoRA or FLoRA, or with a Delta-LoRA update"
            raise SwapError(name, given, "layers that `swap_` made and DyLoRA trained")
    for m in layers.values():
        if m.pair_owner is None:
            m.lora_A = nn.Parameter(m.lora_A[:b].clone(), m.lora_A.requires_grad)
            m.lora_B = nn.Parameter(m.lora_B[:, :b].clone(), m.lora_B.requires_grad)
        else:
            m.share_pair(m.pair_owner, m.share_group)  # which was cut
        m.scaling = m.lora_alpha / b if scale == "alpha/b" else m.scaling
        m.r, m.lora_alpha = b, m.scaling * b
        m.gate = m.training_gate = None
    return swap_report(model)


def _check_rank(b: object, most: int) -> int:
    rank = check_int("b", b, 1)
    if rank > most:
        raise ArgumentError("b", b, f"1 to {most}")
    return rank


def _check_scale(scale: object) -> None:
    if scale not in SCALES:
        raise ArgumentError("scale", repr(scale), " or ".join(map(repr, SCALES)))


def _check_distribution(weights: Sequence[float] | None, n: int) -> Tensor:
    if weights is None:
        return torch.ones(n)
    accepted = f"{n} numbers >= 0, one for each of r_min to r_max, not all 0"
    try:
        found = [float(w) for w in weights]
    except (TypeError, ValueError):
        raise ArgumentTypeError("distribution", repr(weights), accepted) from None
    if len(found) != n or not all(math.isfinite(w) and w >= 0 for w in found) or not sum(found):
        raise ArgumentError("distribution", repr(weights), accepted)
    return torch.tensor(found)
