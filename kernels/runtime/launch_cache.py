"""What was made for the last few lists of tensors: their checks, and their prepared launches.

A list that comes again is not checked and prepared again, as long as its tensors stay at the same
addresses with the same shapes.
"""

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor

from .gpu import current_stream, is_capturing

T = TypeVar("T")


def fingerprint(tensors: Iterable[Tensor | None]) -> tuple | None:
    """The current stream, and 128 bits that tell lists of tensors apart.

    The bits depend on the addresses, dtypes, devices, shapes and strides. The fingerprint is None,
    which fits no list, if the C++ extension is not built; if an entry is not a plain tensor,
    parameter or None, or has no strides (sparse, nested); or during the capture of a CUDA graph,
    whose launches need tables of their own.
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
    numbers = made(tensors)
    return (current_stream(device), *numbers) if numbers else None


class LaunchCache:
    """Keeps what was made for the CAPACITY keys that were used last."""

    CAPACITY = 32

    def __init__(self):
        self._made: OrderedDict[Hashable, object] = OrderedDict()

    def get(self, key: Hashable | None, make: Callable[[], T]) -> T:
        """What ``make`` returned for this key.

        It is called for a new key, and always for None. If it raises, nothing is kept.
        """
        if key is None:
            return make()
        if key not in self._made:
            self._made[key] = make()
            if len(self._made) > self.CAPACITY:
                self._made.popitem(last=False)
        self._made.move_to_end(key)
        return self._made[key]
