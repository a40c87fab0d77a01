"""Sharded tensors in an optimizer: the part that this process holds, and what it needs of others.

FSDP2 (`fully_shard`) shards W (out, in) and lora_B (out, r) by their rows, and lora_A (r, in) by
its rank. AdamW needs no more than the local parts. The update of the local rows of W,

    W += lambda s (dB A' + B dA)

needs the whole A' and dA, and no part of W, B or dB that others hold. `WholeFactors` gathers A' and
dA of all layers at once: 2 r in numbers for a layer, in one collective a step. The weight of a
Conv1D is (in, out), so that its rows are columns of W: their update needs the whole B' and dB, too.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist
from torch import Tensor, nn

from ..checks import wide_dtype
from ..errors import ArgumentTypeError, SwapError
from ..layers.lora_linear import LoraLinear
from ..ranks import is_sharded, local, reshard, why_no_shard

if TYPE_CHECKING:
    from torch.distributed.tensor import DTensor


def check_shards(name: str, t: Tensor) -> None:
    """Raise ArgumentTypeError where a tensor is neither whole nor split by rows."""
    reason = why_no_shard(t)
    if reason is not None:
        accepted = "whole tensors, or those that `fully_shard` splits by their rows"
        raise ArgumentTypeError(name, reason, accepted)


def to_launch(t: Tensor) -> Tensor:
    """What a kernel gets of a tensor: the local part, or one number where that is empty."""
    part = local(t.detach())
    return part if part.numel() else part.new_zeros(1)


class ShardedPlaces:
    """Where sharded parameters stand in their modules, and whether they still do.

    FSDP puts whole parameters in their places for a forward or backward pass. A step while they
    stand there would be lost to the next forward pass, which would use them as they are.

    Args:
        modules: whose parameters the optimizer has.
        params: the optimizer's.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Tensor]):
        self._modules = modules
        for layer in (m for module in modules for m in module.modules()):
            if isinstance(layer, LoraLinear):
                layer.share_with_base()
        mine = {p for p in params if is_sharded(p)}
        self._places = [
            (m._parameters, name, p)
            for module in modules
            for m in module.modules()
            for name, p in m._parameters.items()
            if p is not None and p in mine
        ]

    def restore(self) -> None:
        """Put the sharded parameters back where whole ones stand.

        Raises:
            SwapError: something else took their place.
        """
        if not self._moved():
            return
        for module in self._modules:
            reshard(module)
        for name in self._moved():
            accepted = "the parameter that the optimizer was made for"
            raise SwapError(name, "another parameter in its place", accepted)

    def _moved(self) -> list[str]:
        return [name for held, name, p in self._places if held.get(name) is not p]


def check_order(modules: Sequence[nn.Module], params: Sequence[Tensor]) -> None:
    """Raise SwapError where the modules were sharded after the optimizer took their parameters."""
    if any(is_sharded(p) for p in params):
        return
    if any(is_sharded(p) and p.requires_grad for m in modules for p in m.parameters()):
        given = "an optimizer that was made before `fully_shard`, so that it trains nothing"
        raise SwapError("optimizer", given, "`swap_`, then `fully_shard`, then the optimizer")


def check_shared_pairs(modules: Sequence[nn.Module]) -> None:
    """Raise SwapError where `fully_shard` made several pairs of one that layers share."""
    for layer in (m for module in modules for m in module.modules()):
        owner = layer.pair_owner if isinstance(layer, LoraLinear) else None
        if owner is not None and layer.lora_A is not owner.lora_A:
            given = f"units of `fully_shard` that split the shared pair of {layer.share_group!r}"
            accepted = (
                "one unit around all layers that share it, such as the model alone, or the list "
                "of them in one call; or `apply_` with share=False"
            )
            raise SwapError("model", given, accepted)


def check_exchange(
    known: Collection[Tensor], params: Sequence[Tensor], counts: Iterable[Tensor]
) -> None:
    """Raise SwapError where other parameters took the place of all those that were trained.

    Accelerate shards a model whose optimizer exists already, and puts the sharded parameters into
    its groups. DeepSpeed's ZeRO puts vectors there, and one after the other if it has several.
    Before the first step nothing is lost by that; later the moments would be.

    Args:
        known: the parameters of which the optimizer has a state.
        params: those that its groups hold now.
        counts: the steps done, on each device.
    """
    gone, new = set(known) - set(params), set(params) - set(known)
    if not gone or not new or any(map(is_sharded, gone)) or not any(map(int, counts)):
        return
    if any(map(is_sharded, new)):
        given = (
            "sharded parameters in the place of those that it trained, whose state would be lost"
        )
        accepted = (
            "`accelerator.prepare(model, optimizer)` before the first step or `load_state_dict`"
        )
        raise SwapError("optimizer", given, accepted)
    if len(gone) == len(known) and len(new) == len(params):
        given = "other parameters in the place of all that it trained, whose state would be lost"
        accepted = (
            "`deepspeed.initialize` before the first step or `load_state_dict`, and one vector "
            'under ZeRO: one param group, and a "sub_group_size" that it does not exceed'
        )
        raise SwapError("optimizer", given, accepted)


class WholeFactors:
    """All of sharded factors and of their last changes, in memory that stays where it is.

    Args:
        factors: each lora_A (r, in) or lora_B (out, r), sharded by rows over one and the same mesh.
        deltas: the local rows of the change of each, such as A' - A, in the dtype that the factor
            is summed in.

    Attributes:
        wholes, deltas: of each factor, in the dtypes of the arguments; as of the last call.
    """

    def __init__(self, factors: "Sequence[DTensor]", deltas: Sequence[Tensor]):
        self._factors, first = factors, factors[0]
        dim = next(i for i, p in enumerate(first.placements) if p.is_shard())
        self._size = first.device_mesh.size(dim)
        self._group = first.device_mesh.get_group(dim)
        wide, device = wide_dtype(first.dtype), deltas[0].device
        self._sources = [
            t for a, delta in zip(factors, deltas, strict=True) for t in (local(a), delta)
        ]
        # Every process sends as many rows as the first one has, which may be more than it has.
        rows = [-(-a.shape[0] // self._size) for a in factors]
        sizes = [2 * n * a.shape[1] for n, a in zip(rows, factors, strict=True)]
        self._mine = torch.zeros(sum(sizes), dtype=wide, device=device)
        self._all = self._mine.new_empty(self._size, sum(sizes))
        self._slots: list[Tensor] = []
        for part, n, a, delta in zip(self._mine.split(sizes), rows, factors, deltas, strict=True):
            self._slots += part.view(2, n, a.shape[1])[:, : len(delta)].unbind()
        self.wholes = [torch.empty(a.shape, dtype=a.dtype, device=device) for a in factors]
        self.deltas = [torch.zeros_like(a, dtype=wide) for a in self.wholes]
        self._targets: list[Tensor] = []  # where each row goes, and where it comes from
        self._parts: list[Tensor] = []
        for received, n, whole_t, delta in zip(
            self._all.split(sizes, dim=1), rows, self.wholes, self.deltas, strict=True
        ):
            for i, sent in enumerate(received):
                first_row, pair = i * n, sent.view(2, n, whole_t.shape[1])
                count = max(0, min(n, whole_t.shape[0] - first_row))
                if count:
                    self._parts += pair[:, :count].unbind()
                    self._targets += [t[first_row : first_row + count] for t in (whole_t, delta)]

    def of(self, factor: Tensor) -> tuple[Tensor, Tensor]:
        """All of a factor, and of its change."""
        i = next(i for i, other in enumerate(self._factors) if other is factor)
        return self.wholes[i], self.deltas[i]

    @torch.no_grad()
    def __call__(self) -> None:
        """Gather the factors and their changes as they are now."""
        torch._foreach_copy_(self._slots, self._sources)
        dist.all_gather_into_tensor(self._all.view(-1), self._mine, group=self._group)
        torch._foreach_copy_(self._targets, self._parts)
