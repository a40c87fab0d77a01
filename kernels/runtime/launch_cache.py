"""Lists of tensors that came before: they are checked once, and their launch prepared once, for as
long as the tensors stay where they are."""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from .async_copy import current_stream, is_capturing

T = TypeVar("T")


def fingerprint(tensors: Iterable[Tensor | None]) -> tuple | None:
    """128 bits made of addresses, dtypes, devices, shapes and strides, and the stream.

    None where there is no telling: C++ is not built, an entry is no plain tensor, or a CUDA graph
    is captured, whose launches need tables that no one else writes.
    """
    tensors = list(tensors)
    made = getattr(torch.ops.deltadiff, "fingerprint", None)
    if made is None or not all(
        t is None or type(t) in (Tensor, torch.nn.Parameter) for t in tensors
    ):
        return None
    device = next((t.device for t in tensors if t is not None), torch.device("cpu"))
    if is_capturing(device):
        return None
    return current_stream(device), *made(tensors)


class Seen:
    """What was made for the last few keys."""

    MOST = 32

    def __init__(self):
        self._made: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable | None, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key; made anew for None. What raises is not kept."""
        if key is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > self.MOST:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]
