"""`AddressTracker`: where the tensors of an optimizer step lie, and which of them changed.

Kernels read pointers from tables on the device. The host must ask in every step, of hundreds of
tensors, whether a table still holds. `csrc/address_tracker.cpp` asks in a tenth of the time.
"""

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from ..ops.backends import why_unavailable

MOVED, GRADS, ANY, ALIGNED, WRITTEN = 1, 2, 4, 8, 16  # the bits of `AddressTracker.look`


class AddressTracker:
    """Tracks the addresses of one device's parameters, of their gradients, and of weights.

    A gradient that its parameter's kernel cannot read as it is (another dtype, not contiguous) is
    copied at each look.

    A parameter may have a copy, which each step writes too. Both tensors' version counters then
    keep their distance until something else writes one of them.
    """

    def __init__(self, params: list[Tensor], weights: list[Tensor], copies: list[Tensor | None]):
        self.params, self.weights = params, weights
        self.pairs = [(p, c) for p, c in zip(params, copies, strict=True) if c is not None]
        self.known = [t.data_ptr() for t in (*params, *weights)]
        self.addresses = [0] * len(params)
        self.copy_of = dict(self.pairs)
        self.fitting: list[Tensor] = []  # gradients in the form that the kernels read
        self.accept()

    def accept(self) -> None:
        """What was written so far is known from now on."""
        self.known_writes = self._writes()

    def _writes(self) -> int:
        return sum(p._version - c._version for p, c in self.pairs)

    def _differ(self) -> bool:
        on_cpu = ((p, c) for p, c in self.pairs if not p.is_cuda)
        return any(p.dtype == c.dtype and not torch.equal(p, c) for p, c in on_cpu)

    def look(self) -> int:
        """Compare all addresses with those known.

        Returns the sum of these bits:
            MOVED: the address of a parameter or weight changed since construction.
            GRADS: the address of a gradient changed since the last look.
            ANY: there is a gradient.
            ALIGNED: the addresses of all gradients are multiples of 16 bytes.
            WRITTEN: something else than a step wrote a parameter that has a copy. Of writes through
                ``.data`` the host sees those on the CPU alone; `adamw_step_` sees all.
        """
        moved = [t.data_ptr() for t in (*self.params, *self.weights)] != self.known
        fitting = [
            p.grad if p.grad is None else p.grad.to(p.dtype).contiguous() for p in self.params
        ]
        pairs = zip(self.params, fitting, strict=True)
        self.fitting = [g for p, g in pairs if g is not p.grad and g is not None]
        before = self.addresses
        self.addresses = [0 if g is None else g.data_ptr() for g in fitting]
        return (
            MOVED * moved
            | GRADS * (self.addresses != before)
            | ANY * any(self.addresses)
            | ALIGNED * (not any(address % 16 for address in self.addresses))
            | WRITTEN * (self._writes() != self.known_writes or (not moved and self._differ()))
        )

    def grads(self) -> Tensor:
        """(parameters,) int64 on the CPU: the gradients' addresses at the last look, 0 for none."""
        return torch.tensor(self.addresses, dtype=torch.int64)

    def wrote(self, weights: bool) -> None:
        """Tell autograd that the parameters with a gradient were written, and maybe the weights."""
        pairs = zip(self.params, self.addresses, strict=True)
        written = [p for p, address in pairs if address]
        increment_version([*written, *(self.copy_of[p] for p in written if p in self.copy_of)])
        if weights:
            increment_version(self.weights)


def track_addresses(
    params: list[Tensor], weights: list[Tensor], copies: list[Tensor | None]
) -> AddressTracker:
    """An `AddressTracker`; where it was built, the one in C++, which has the same methods."""
    if why_unavailable("cpp", torch.device("cpu"), torch.float32) is None:
        return torch.classes.deltadiff.AddressTracker(params, weights, copies)
    return AddressTracker(params, weights, copies)
