"""`Ranks`: the processes that train one model together, each with its part of every batch."""

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch._utils import _flatten_dense_tensors, _unflatten_dense_tensors


class Ranks:
    """The processes of a group. One process alone needs no group, and then nothing is sent.

    Args:
        group: None is the default group where `torch.distributed` runs, else this process alone.

    Attributes:
        rank, size: the number of this process in the group, and how many there are.
    """

    def __init__(self, group: "dist.ProcessGroup | None" = None):
        running = dist.is_available() and dist.is_initialized()
        self.group = group
        self.size = dist.get_world_size(group) if running else 1
        self.rank = dist.get_rank(group) if running else 0

    def average_(self, tensors: Sequence[Tensor]) -> None:
        """Put the mean over all processes into each tensor, in place.

        All processes call it with tensors of the same shapes, dtypes and order. What is not finite
        in one process is not finite in any afterwards.
        """
        if self.size == 1:
            return
        for kind in dict.fromkeys((t.dtype, t.device) for t in tensors):
            mine = [t for t in tensors if (t.dtype, t.device) == kind]
            flat = _flatten_dense_tensors(mine)
            dist.all_reduce(flat, group=self.group)
            flat /= self.size
            torch._foreach_copy_(mine, _unflatten_dense_tensors(flat, mine))

    def copy_first_(self, tensors: Sequence[Tensor]) -> None:
        """Put the values of the first process into the tensors of all, in place."""
        if self.size == 1:
            return
        first = 0 if self.group is None else dist.get_global_rank(self.group, 0)
        for t in tensors:
            dist.broadcast(t, first, group=self.group)
