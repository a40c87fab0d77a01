"""`RoundingLoss`: how much of an update of W round-to-nearest loses, said once in a warning."""

import functools
import operator
import warnings
from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor


class LayerUpdate(NamedTuple):
    """One layer's arguments of `delta_update_`: W, A', B', A' - A, B' - B and the scale."""

    weight: Tensor
    lora_A: Tensor
    lora_B: Tensor
    delta_A: Tensor
    delta_B: Tensor
    scale: float


class RoundingLoss:
    """Measures one update, and warns as soon as the host has the figures, for which it never waits.

    Attributes:
        told: whether the warning was given.
    """

    def __init__(self) -> None:
        self.told = False
        self._sums: Tensor | None = None  # <got, wanted> and |wanted|^2, on the host
        self._copied: torch.cuda.Event | None = None  # when they are there

    def measure(self, updates: Iterable[LayerUpdate]) -> None:
        """Measure the coming update of all layers, unless one is being measured already.

        Warn if the figures are there.
        """
        if self._sums is None:
            sums = functools.reduce(operator.add, map(update_shares, updates))
            if sums.is_cuda:
                stream = torch.cuda.current_stream(sums.device)
                sums = torch.empty(2, pin_memory=True).copy_(sums, non_blocking=True)
                self._copied = torch.cuda.Event()
                self._copied.record(stream)
            self._sums = sums
        if self._copied is not None and not self._copied.query():
            return
        got, wanted = self._sums.tolist()
        self._sums = self._copied = None
        if wanted:
            self.told = True
            warnings.warn(
                f'rounding="nearest" lost {1 - got / wanted:.1%} of the first weight update; '
                '"remainder" loses none, "stochastic" none on average',
                stacklevel=4,
            )


def update_shares(update: LayerUpdate) -> Tensor:
    """<got, wanted> and |wanted|^2 of the next update under round-to-nearest, of one layer.

    (2,) float32 on the device. Their ratio is the share of the wanted update that reaches W. Blocks
    of rows keep temporaries smaller than W.
    """
    weight, lora_A, lora_B, delta_A, delta_B, scale = update
    sums = torch.zeros(2, dtype=torch.float32, device=weight.device)
    a, da = lora_A.detach().float(), delta_A.float()
    rows = max(1, 2**20 // weight.shape[1])
    blocks = zip(*(t.detach().split(rows) for t in (weight, lora_B, delta_B)), strict=True)
    for w, b, db in blocks:
        wanted = scale * (db.float() @ a + (b.float() - db.float()) @ da)
        got = (w.float() + wanted).to(w.dtype).float() - w.float()
        sums += torch.stack([(got * wanted).sum(), (wanted * wanted).sum()])
    return sums
