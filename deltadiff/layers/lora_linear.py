"""`LoraLinear`, the layer that `swap_` puts in, and `PendingDelta`, what Delta-LoRA adds to it.

Delta-LoRA telescopes: with a constant update ratio, W_T - W_0 = lambda s (B_T A_T - B_k A_k), where
A_k, B_k (the *anchors*) are the factors before the first step that updates W. So the layer can show
the update in two ways: it is inside W ("inplace"), or the forward pass adds it as a rank-2r product
and W is never written ("factored"):

    y = x W_0^T + s [(1 + lambda) B, -lambda B_k] [A; A_k] x
"""

import torch
from torch import Tensor, nn

from ..checks import DTYPES
from ..errors import SwapError
from ..ops.dispatch import Dispatch, choose_path
from ..ops.lora_linear import lora_linear
from .linear import is_conv1d, linear_shape
from .pending_delta import PendingDelta


class LoraLinear(nn.Linear):
    """Linear layer with a low-rank branch, y = x W^T + bias + s g (x A^T) B^T, by `lora_linear`.

    Made by `deltadiff.swap_`. Shares ``weight`` and ``bias`` with the layer that it stands for.

    In training mode the branch sees x after dropout. Each forward pass draws the seed of its mask
    from PyTorch's generator of the device, so the masks follow `torch.manual_seed`; CUDA graphs and
    compiled models get new ones, and activation checkpointing, which keeps the generator's state
    (``preserve_rng_state``), gets the same one when it computes a pass again.

    Attributes:
        weight: as that layer stores it, (in, out) for a `Conv1D`; ``matrix`` is (out, in) always.
        lora_A: (r, in_features); lora_B: (out_features, r).
        r, lora_alpha, scaling: scaling is lora_alpha / r (rsLoRA: lora_alpha / sqrt(r)).
        lora_dropout: probability that an element of x is left out, in training mode.
        gate: g, one entry or r entries on the device, a parameter where it is trained; None is 1.
        share_group: name of the group of layers that hold this very pair, whose W Delta-LoRA
            leaves alone (DiffoRA's weight sharing); None for a pair of the layer's own.
        original: the layer that was here before.
        delta: what Delta-LoRA has added so far, None for plain LoRA.
        added: ``delta`` where the forward pass adds it, None where W holds all of it.
        swapped_in: False after `unswap_` or `merge_` took the layer out.
    """

    def __init__(
        self, original: nn.Module, base: nn.Module, lora_A, lora_B, lora_alpha, scaling,
        lora_dropout=0.0, backend=None,
    ):  # fmt: skip
        nn.Module.__init__(self)
        self.out_features, self.in_features = linear_shape(base)
        self.transposed, self.share_group = is_conv1d(base), None
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.Parameter(lora_A), nn.Parameter(lora_B)
        self.r, self.scaling, self.backend = lora_A.shape[0], scaling, backend
        self.lora_alpha, self.lora_dropout = lora_alpha, lora_dropout
        self.delta = self.gate = None
        self.swapped_in = True
        # Not registered as submodules: their parameters are this layer's.
        self.__dict__["original"], self.__dict__["base"] = original, base

    @property
    def delta(self) -> PendingDelta | None:
        return self._delta

    @delta.setter
    def delta(self, delta: PendingDelta | None) -> None:
        self._delta = delta
        # All that forward looks at: torch.compile need not compile again when a delta begins in W.
        self.added = None if delta is None or delta.in_weight else delta

    @property
    def matrix(self) -> Tensor:
        """W, (out, in): a view of ``weight``. All but bookkeeping works on this."""
        return self.weight.T if self.transposed else self.weight

    @property
    def adapter(self) -> list[nn.Parameter]:
        """The parameters that are this layer's own: the pair, and a gate that is trained."""
        gate = [self.gate] if isinstance(self.gate, nn.Parameter) else []
        return [self.lora_A, self.lora_B, *gate]

    @property
    def quantised(self) -> bool:
        """Whether ``weight`` is stored in a form that only the base layer can multiply by."""
        return self.weight.dtype not in DTYPES

    @property
    def dispatch(self) -> Dispatch:
        """Which backend, and which kernels of it, run this layer in training, and why."""
        if self.quantised:
            return Dispatch(
                "reference", f"{self.weight.dtype} weight: the base layer's own product"
            )
        rank = self.r if self.added is None else self.added.rank
        layer = (self.out_features, self.in_features, rank)
        how = self.lora_dropout > 0, self.transposed
        return choose_path(self.weight.device, self.weight.dtype, self.backend, layer, *how)

    def forward(self, x: Tensor) -> Tensor:
        a, b, gate = self.lora_A, self.lora_B, self.gate
        dropout, seed = self.lora_dropout if self.training else 0.0, 0
        if self.added is not None:
            if gate is not None:
                raise SwapError("gate", "a gate beside a factored delta", "one of the two")
            if dropout:
                given = f"lora_dropout={dropout} on a layer whose branch holds a Delta-LoRA update"
                raise SwapError("lora_dropout", given, "0, or `merge_` first and swap again")
            a, b, gate = self.added.stack(a, b, self.scaling)
        if self.quantised:
            s = nn.functional.dropout(x, dropout) @ a.to(x.dtype).T
            s = s if gate is None else s * gate.to(x.dtype)
            return self.base(x) + self.scaling * (s @ b.to(x.dtype).T)
        if dropout:
            seed = torch.randint(2**63 - 1, (), device=x.device)
        return lora_linear(
            x, self.matrix, a, b, scaling=self.scaling, gate=gate, bias=self.bias,
            dropout=dropout, seed=seed, backend=self.backend,
        )  # fmt: skip

    def extra_repr(self) -> str:
        dropout = f", lora_dropout={self.lora_dropout:g}" if self.lora_dropout else ""
        return f"{super().extra_repr()}, r={self.r}, lora_alpha={self.lora_alpha:g}{dropout}"


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """The LoraLinear layers of a model by name."""
    return {name: m for name, m in model.named_modules() if isinstance(m, LoraLinear)}
