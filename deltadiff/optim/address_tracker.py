"""`AddressTracker`: where the tensors of an optimizer step lie, and which of them moved.

Kernels read pointers from tables on the device. The host must ask in every step, of hundreds of
tensors, whether a table still holds. `csrc/address_tracker.cpp` asks in a tenth of the time.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops.dispatch import why_unavailable

MOVED, GRADS, ANY, ALIGNED = 1, 2, 4, 8  # the bits of `AddressTracker.look`


class AddressTracker:
    """Tracks the addresses of one device's parameters, of their gradients, and of weights.

    A gradient that its parameter's kernel cannot read as it is (another dtype, not contiguous) is
    copied at each look.
    """

    def __init__(self, params: list[Tensor], weights: list[Tensor]):
        self.params, self.weights = params, weights
        self.known = [t.data_ptr() for t in (*params, *weights)]
        self.addresses = [0] * len(params)
        self.copies: list[Tensor] = []

    def look(self) -> int:
        """Compare all addresses with those known.

        Returns the sum of these bits:
            MOVED: the address of a parameter or weight changed since construction.
            GRADS: the address of a gradient changed since the last look.
            ANY: there is a gradient.
            ALIGNED: the addresses of all gradients are multiples of 16 bytes.
        """
        moved = [t.data_ptr() for t in (*self.params, *self.weights)] != self.known
        fitting = [
            p.grad if p.grad is None else p.grad.to(p.dtype).contiguous() for p in self.params
        ]
        pairs = zip(self.params, fitting, strict=True)
        self.copies = [g for p, g in pairs if g is not p.grad and g is not None]
        before = self.addresses
        self.addresses = [0 if g is None else g.data_ptr() for g in fitting]
        return (
            MOVED * moved
            | GRADS * (self.addresses != before)
            | ANY * any(self.addresses)
            | ALIGNED * (not any(address % 16 for address in self.addresses))
        )

    def grads(self) -> Tensor:
        """(parameters,) int64 on the CPU: the gradients' addresses at the last look, 0 for none."""
        return torch.tensor(self.addresses, dtype=torch.int64)

    def wrote(self, weights: bool) -> None:
        """Tell autograd that the parameters with a gradient were written, and maybe the weights."""
        pairs = zip(self.params, self.addresses, strict=True)
        increment_version([p for p, address in pairs if address])
        if weights:
            increment_version(self.weights)


def track_addresses(params: list[Tensor], weights: list[Tensor]) -> AddressTracker:
    """An `AddressTracker`; where it was built, the one in C++, which has the same methods."""
    if why_unavailable("cpp", torch.device("cpu"), torch.float32) is None:
        return torch.classes.deltadiff.AddressTracker(params, weights)
    return AddressTracker(params, weights)
