"""`UpdateStart`: what changes on a device in the iteration in which the updates of W start.

The device alone knows the iteration t, because it alone knows which steps were skipped. So the host
lays down beforehand what shall hold from which iteration on, and the launch that counts a step puts
it into force (`ops.reference.advance_counters_ref_`).
"""

from typing import Any

import torch
from torch import Tensor

from ..checks import wide_dtype
from .weight_update import WeightUpdate

NEVER = 2**62  # an iteration that is not reached


class RankScales:
    """Vectors of factors on ranks, all of one dtype in one tensor.

    Attributes:
        places: where each vector lies.
        now: the factors that hold in the coming iteration.
        after: the factors that hold from an iteration on.
        from_iteration: int64, that iteration, for each factor.
    """

    SPACING = 64  # elements: each vector starts a cache line

    def __init__(self, sizes: list[int], dtype: torch.dtype, device: torch.device):
        starts = [0]
        for size in sizes:
            starts.append(starts[-1] + -(-size // self.SPACING) * self.SPACING)
        self.places = [slice(a, a + n) for a, n in zip(starts, sizes, strict=False)]
        self.now = torch.zeros(starts[-1], dtype=dtype, device=device)
        self.after = torch.zeros_like(self.now)
        self.from_iteration = torch.full(self.now.shape, NEVER, dtype=torch.int64, device=device)


class UpdateStart:
    """The starts of the weight updates of one device; of none where there are no groups.

    Attributes:
        firsts: (groups,) int64, K + 1 of each param group.
        flags: (groups, 2) int32, of the coming iteration: t > K, t == K + 1.
        rank_scales: one for each dtype of the factors, at least one.
    """

    def __init__(
        self, device: torch.device, groups: list[dict[str, Any]], updates: list[WeightUpdate]
    ):
        """``updates``: the device's `WeightUpdate`s, which get their flag and factors."""
        firsts = [group["start_step"] + 1 for group in groups]
        self.firsts = torch.tensor(firsts, dtype=torch.int64, device=device)
        self.flags = torch.zeros(len(groups), 2, dtype=torch.int32, device=device)
        self._group_flags = {id(g): tuple(f) for g, f in zip(groups, self.flags, strict=True)}
        self.rank_scales: list[RankScales] = []
        self._give_rank_scales(device, updates)
        for update in updates:
            update.started, _ = self.flags_of(update.group)

    def flags_of(self, group: dict[str, Any]) -> tuple[Tensor, Tensor]:
        """0-dim views: t > K and t == K + 1 of a param group."""
        return self._group_flags[id(group)]

    def _give_rank_scales(self, device: torch.device, updates: list[WeightUpdate]) -> None:
        """Each update gets one vector for each rank of its layers."""
        wanted: dict[torch.dtype, list[tuple[WeightUpdate, int]]] = {}
        for update in updates:
            for layer in update.layers.values():
                pairs = wanted.setdefault(wide_dtype(layer.lora_A.dtype), [])
                if (update, layer.r) not in pairs:
                    pairs.append((update, layer.r))
        for dtype, pairs in wanted.items():
            scales = RankScales([2 * r for _, r in pairs], dtype, device)
            for (update, r), place in zip(pairs, scales.places, strict=True):
                update.rank_scales[r] = scales.now[place]
                update.rank_scales_after[r] = scales.after[place]
                scales.from_iteration[place] = update.start_step + 2
            self.rank_scales.append(scales)
        if not self.rank_scales:
            self.rank_scales.append(RankScales([], torch.float32, device))

    def set_iteration(self, t: int) -> None:
        """Make the flags those of iteration ``t``."""
        self.flags[:, 0] = self.firsts <= t
        self.flags[:, 1] = self.firsts == t
